"""Hard tokens that look up the training text: the mixture, models that use it, files, and the command."""

import dataclasses
import math

import pytest
import torch
from conftest import byte_tokenizer, english_texts, text_ids
from export_cases import random_base
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cascade_fast import neighbors as command
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.criteria import token_entropy
from cascade_fast.input_checks import InputError
from cascade_fast.model import neighbors
from cascade_fast.model.export import export
from cascade_fast.model.neighbors import HardTokenNeighbors, NeighborsConfig, keep_tokens, read_tokens
from cascade_fast.runtime.files import DamagedFile
from cascade_fast.settings import make_settings

LAYERS = (1, 2)
KEY = 12
CONFIG = NeighborsConfig(LAYERS, threshold=-3.0, neighbors=5, temperature=0.1, gate=(-0.5, 0.3, 0.2))


@pytest.fixture
def model(tmp_path):
    folder = random_base(tmp_path / "base", "llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def some_neighbors(model, config=CONFIG, kept=40) -> HardTokenNeighbors:
    e, v = 2 * model.config.hidden_size, model.config.vocab_size
    label_M = torch.randint(0, v, (kept,))
    return HardTokenNeighbors(
        config, normalize(torch.randn(kept, KEY), dim=-1), label_M, torch.randn(e) / 5, torch.randn(e, KEY)
    )


def states_of(model, ids):
    """What goes into the layers' feed-forward parts, without a hook: from the hidden states."""
    states, places = [], torch.arange(ids.shape[1])[None]
    for number in LAYERS:
        layer, hidden = model.model.layers[number], model(ids, output_hidden_states=True).hidden_states[number]
        angles = model.model.rotary_emb(hidden, places)
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=angles, attention_mask=None)
        states.append(layer.post_attention_layernorm(hidden + attended))
    return torch.cat(states, dim=-1)


def expected(of: HardTokenNeighbors, state_E, logits_V) -> torch.Tensor:
    """Probabilities of one token, float64, as on paper."""
    p_V = logits_V.double().softmax(-1)
    if -(p_V * p_V.log()).sum() < -of.config.threshold:
        return p_V
    query_P = normalize((state_E.double() - of.mean_E) @ of.projection_EP.double(), dim=-1)
    cosine_M = of.key_MP.double() @ query_P
    nearest = sorted(range(len(cosine_M)), key=lambda i: -cosine_M[i])[: of.config.neighbors]
    weights = torch.stack([(cosine_M[i] / of.config.temperature).exp() for i in nearest])
    found_V = torch.zeros_like(p_V)
    for i, weight in zip(nearest, weights / weights.sum(), strict=True):
        found_V[of.label_M[i]] += weight
    a, b, c = of.config.gate
    share = torch.sigmoid(a + b * cosine_M[nearest[0]] + c * found_V[of.label_M[nearest[0]]])
    return (1 - share) * p_V + share * found_V


@pytest.mark.usefixtures("no_gradients")
class TestMixture:
    @pytest.mark.parametrize("kept", [3, 40])  # fewer than are asked, and more
    def test_it_is_the_formula(self, model, kept):
        ids, of = text_ids(), some_neighbors(model, kept=kept)
        logits, states = model(ids).logits, states_of(model, ids)
        entropy = token_entropy(logits)
        config = dataclasses.replace(CONFIG, threshold=-entropy.sort().values[47:49].mean().item())  # of 96
        of = HardTokenNeighbors(config, of.key_MP, of.label_M, of.mean_E, of.projection_EP)
        found = of(states, logits).flatten(0, 1)
        rows = zip(states.flatten(0, 1), logits.flatten(0, 1), strict=True)
        probabilities = torch.stack([expected(of, *row) for row in rows])
        torch.testing.assert_close(found.softmax(-1).double(), probabilities, rtol=1e-5, atol=1e-6)
        easy = entropy < -config.threshold
        assert 0 < easy.sum() < len(easy)
        assert torch.equal(found[easy], logits.flatten(0, 1)[easy])

    def test_no_token_is_hard(self, model):
        of, logits = some_neighbors(model, dataclasses.replace(CONFIG, threshold=-100.0)), torch.randn(2, 3, 400)
        assert of(torch.randn(2, 3, 2 * model.config.hidden_size), logits) is logits

    def test_in_parts_it_finds_the_same(self, model, monkeypatch):
        of, state = some_neighbors(model), torch.randn(7, 2 * model.config.hidden_size)
        whole = of.search(state)
        monkeypatch.setattr(neighbors, "SEARCH_BYTES", 4 * 40 * 3)
        parts = of.search(state)
        torch.testing.assert_close(parts.cosine_KX, whole.cosine_KX)
        assert torch.equal(parts.label_KX, whole.label_KX)
        assert of.search(state[:0]).label_KX.shape == (0, 5)


@pytest.mark.usefixtures("no_gradients")
class TestAttached:
    def test_a_model_s_logits_and_loss_are_the_mixture_s(self, model):
        ids, of = text_ids(), some_neighbors(model)
        plain = model(ids).logits
        mixed = of(states_of(model, ids), plain)
        assert not torch.equal(mixed, plain)
        of.attach(model)
        found = model(ids, labels=ids)
        torch.testing.assert_close(found.logits, mixed)
        loss = torch.nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, mixed[:, -2:])
        of.detach()
        assert torch.equal(model(ids).logits, plain)

    def test_generation_with_a_cache_is_that_of_whole_texts(self, model):
        ids, of = text_ids(2, 9), some_neighbors(model)
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8)
        of.attach(model)
        found = model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8)
        whole = ids
        for _ in range(8):
            logits = model(whole, use_cache=False).logits[:, -1].clone()
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found, whole)
        assert not torch.equal(found, plain)

    def test_what_cannot_be(self, model):
        of = some_neighbors(model).attach(model)
        with pytest.raises(ValueError, match="attached to a model already"):
            of.attach(model)
        with pytest.raises(ValueError, match="return_dict: False"):
            model(text_ids(), return_dict=False)
        of.detach()
        with pytest.raises(ValueError, match=r"layers: \(1, 3\); must be in \[0, 3\)"):
            some_neighbors(model, dataclasses.replace(CONFIG, layers=(1, 3))).attach(model)
        with pytest.raises(ValueError, match="hidden size"):
            HardTokenNeighbors(CONFIG, torch.ones(2, 4), torch.ones(2), torch.ones(8), torch.ones(8, 4)).attach(model)
        with pytest.raises(ValueError, match="Linear; must have decoder layers"):
            of.attach(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"keys, labels, mean, projection: \[\(0, 4\)"):
            HardTokenNeighbors(CONFIG, torch.ones(0, 4), torch.ones(0), torch.ones(8), torch.ones(8, 4))


def sequences(count: int, start: int) -> Sequences:
    texts = [byte_tokenizer()(text)["input_ids"] for text in english_texts(count, 40, start)]
    lengths = [len(ids) - 1 - i % 3 for i, ids in enumerate(texts)]  # ragged, and some tokens without a label
    return Sequences.from_lists(
        [ids[: n + 1] for ids, n in zip(texts, lengths, strict=True)],
        [[place % 7 > 0 for place in range(n)] for n in lengths],
    )


class TestMaking:
    def test_labelled_tokens_are_read_in_their_context(self, model):
        read = read_tokens(model, sequences(5, 0), LAYERS, batch_tokens=90, name="reading")
        assert len(read.label_N) == sequences(5, 0).labels
        with torch.no_grad():
            of, row = sequences(5, 0), 0
            for number in range(len(of)):
                ids, labelled = of.ids(number).long()[None], of.labelled(number)
                log_p = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][labelled]
                rows = slice(row, row + len(log_p))
                torch.testing.assert_close(read.log_p_N[rows], log_p)
                states = states_of(model, ids[:, :-1])[0][labelled]
                torch.testing.assert_close(read.state_NE[rows], states)
                assert set(read.sequence_N[rows].tolist()) == {number}
                row = rows.stop
        assert not any(layer.mlp._forward_pre_hooks for layer in model.model.layers)

    def test_the_fit_gains_where_the_text_comes_again_and_little_is_asked_where_it_does_not(self, model):
        kept, again = (read_tokens(model, sequences(12, 0), LAYERS, name="reading") for _ in range(2))
        of = keep_tokens(kept, layers=LAYERS, neighbors=8).fitted(again, 0.5)
        log_p_N, hard_K = of.log_p(again)
        assert len(hard_K) == pytest.approx(0.5 * len(log_p_N), abs=1)
        assert log_p_N[hard_K].mean() > again.log_p_N[hard_K].mean() + 1  # a random model, that looks up every answer
        easy = torch.ones(len(log_p_N), dtype=torch.bool).index_fill(0, hard_K, False)
        assert torch.equal(log_p_N[easy], again.log_p_N[easy])
        nonsense = dataclasses.replace(kept, label_N=torch.zeros_like(kept.label_N))  # a token that never follows
        beside = keep_tokens(nonsense, layers=LAYERS, neighbors=8).fitted(again, 0.5)
        assert beside.log_p(again)[0].mean() == pytest.approx(again.log_p_N.mean().item(), abs=0.01)

    def test_log_p_is_forward_s_and_the_fit_is_the_same_twice(self, model):
        kept, other = (read_tokens(model, sequences(8, at), LAYERS, name="reading") for at in (0, 400))
        one, two = (keep_tokens(kept, layers=LAYERS).fitted(other) for _ in range(2))
        assert one.config == two.config
        of = sequences(8, 400)
        ids = of.ids(0).long()[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
            found = one(states_of(model, ids[:, :-1]), logits).log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
        first = other.sequence_N == 0
        torch.testing.assert_close(one.log_p(other)[0][first], found[of.labelled(0)], rtol=1e-4, atol=1e-4)

    def test_keys_keep_the_cosines_of_states_of_which_no_number_outweighs_the_others(self):
        state = torch.randn(50, 12) * torch.logspace(-2, 2, 12) + 5  # fewer numbers than a key may have
        standard = (state.double() - state.double().mean(0)) / state.double().std(0, correction=0)
        key = neighbors._keys(state, *neighbors._principal(state)).double()
        cosines = torch.nn.functional.cosine_similarity(standard[:, None], standard, dim=-1)
        torch.testing.assert_close(key @ key.T, cosines, rtol=0, atol=1e-4)

    def test_cross_fitting_never_fits_what_it_measures(self, model):
        kept, other = (read_tokens(model, sequences(8, at), LAYERS, name="reading") for at in (0, 400))
        of = keep_tokens(kept, layers=LAYERS)
        found, odd = neighbors.cross_fitted(of, other), other.sequence_N % 2 == 1
        for fits in (odd, ~odd):
            alone = of.fitted(neighbors._rows(other, fits)).log_p(neighbors._rows(other, ~fits))[0]
            assert torch.equal(found[~fits], alone)
        with pytest.raises(InputError, match="one sequence; must be two"):
            neighbors.cross_fitted(of, neighbors._rows(other, other.sequence_N == 0))

    def test_bad_numbers(self, model):
        kept = read_tokens(model, sequences(2, 0), LAYERS, name="reading")
        with pytest.raises(ValueError, match="neighbors: 0; must be at least 1"):
            keep_tokens(kept, layers=LAYERS, neighbors=0)
        with pytest.raises(ValueError, match=r"1\.5"):
            keep_tokens(kept, layers=LAYERS).fitted(kept, 1.5)


class TestFiles:
    def test_saved_and_loaded_it_is_the_same(self, model, tmp_path):
        of = some_neighbors(model)
        of.save_pretrained(tmp_path / "model")
        found = HardTokenNeighbors.from_pretrained(tmp_path / "model")
        assert found.config == of.config
        state, logits = torch.randn(6, 2 * model.config.hidden_size), torch.randn(6, model.config.vocab_size)
        assert torch.equal(found(state, logits), of(state, logits))
        with pytest.raises(InputError, match="has neighbors already"):
            of.save_pretrained(tmp_path / "model")

    def test_a_damaged_file(self, model, tmp_path):
        some_neighbors(model).save_pretrained(tmp_path)
        file = tmp_path / "neighbors" / "neighbors.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(DamagedFile, match="checksum"):
            HardTokenNeighbors.from_pretrained(tmp_path)
        with pytest.raises(DamagedFile, match="missing"):
            HardTokenNeighbors.from_pretrained(tmp_path / "nowhere")


def run(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(adapter_settings, tmp_path, capsys):
    settings = make_settings(
        {**adapter_settings, "num_stages": 1, "hard_ratio": 1.0, "accept": "always", "out": str(tmp_path / "run")}
    )
    run_cascade(settings)
    model = tmp_path / "model"
    export(str(tmp_path / "run"), model, format="merged")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    code, out, err = run(capsys, tmp_path / "run", model, "--neighbors", 16, "--hard-ratio", 0.6, "--dtype", "float32")
    assert code == 0, err
    validation, test, shares, wrote = out.splitlines()[-4:]
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before

    of = HardTokenNeighbors.from_pretrained(model)
    assert (of.config.neighbors, of.config.layers) == (16, (2,))  # of three
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sequences = load_sequences(settings, AutoTokenizer.from_pretrained(model)).splits["test"]
    alone = mean_loss(found, sequences)
    of.attach(found)
    mixed = mean_loss(found, sequences)
    assert test == (
        f"test: perplexity {math.exp(alone):.4f} -> {math.exp(mixed):.4f} with neighbors "
        f"({math.exp(mixed - alone) - 1:+.2%})"
    )
    assert validation.startswith("validation: perplexity ")
    kept = settings.train_blocks * settings.seq_len
    assert shares.endswith(f"are hard and look up; {kept:,} tokens are kept")
    assert wrote.startswith(f"wrote {model / 'neighbors'}: ")

    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300)).save_pretrained(other)
    AutoTokenizer.from_pretrained(model).save_pretrained(other)
    message = "error: model: GPT2LMHeadModel; must have decoder layers with a part 'mlp'\n"
    assert run(capsys, tmp_path / "run", other)[::2] == (2, message)

    code, _, err = run(capsys, tmp_path / "run", model)
    assert (code, err) == (2, f"error: MODEL: {str(model)!r}; has neighbors already: remove "
                              f"{str(model / 'neighbors')!r} first\n")  # fmt: skip


@torch.no_grad()
def mean_loss(model, sequences) -> float:
    ids = sequences.blocks().long()
    logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--neighbors", 0], "neighbors: 0; must be at least 1"),
        (["--batch-tokens", 0], "batch_tokens: 0; must be at least 1"),
        (["--hard-ratio", 1.1], "hard_ratio: 1.1; must be in (0, 1]"),
        ([], "MODEL: 'nowhere'; must be a model's folder, with a config.json: export the run first"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, why):
    assert run(capsys, "run", "nowhere", *words) == (2, "", f"error: {why}\n")
