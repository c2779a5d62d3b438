"""The base pass against transformers' own hidden states, its cache, its resumption and its checks."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import save_tiny_base, tiny_llama_config
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cascade_fast import criteria, ops
from cascade_fast.base import base_pass as module
from cascade_fast.base import fill_store
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import find_base, hub_reachable, read_weights, weight_files
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.files import DamagedFile
from cascade_fast.selection import NonFiniteScores
from cascade_fast.settings import make_settings
from cascade_fast.stages.kind import base_needs

CPU = torch.device("cpu")


def _pass(settings, tmp_path, dtype=torch.float32, **changes):
    settings = make_settings({**settings, **changes})
    base = find_base(settings)
    blocks = load_sequences(settings, base.tokenizer())
    return base_pass(base, blocks, settings, base_needs(settings), Compute(CPU, dtype), tmp_path / "cache"), blocks


@pytest.mark.parametrize("init", ["identity", "random"])
@pytest.mark.parametrize("criterion", ["cosine", "entropy"])
def test_what_is_kept_is_what_transformers_computes(tiny_settings, tmp_path, init, criterion):
    head = "shared" if init == "identity" else "own"
    passed, blocks = _pass(tiny_settings, tmp_path, init=init, head=head, criterion=criterion, store_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_settings["base"], dtype=torch.float32)
    captured = []
    model.model.norm.register_forward_pre_hook(lambda _m, args: captured.append(args[0]))
    for split in ("train", "val", "test"):
        ids, store = blocks.splits[split].blocks().long(), passed.stores[split]
        with torch.no_grad():
            out = model(ids[:, :-1], output_hidden_states=True)
        hidden = captured.pop() if init == "identity" else out.hidden_states[-1]
        torch.testing.assert_close(store.hidden, hidden.flatten(0, 1), rtol=1e-4, atol=1e-4)
        assert torch.equal(store["label"], ids[:, 1:].flatten())
        assert torch.equal(
            store["sequence"].view(-1, 32), torch.arange(len(ids), dtype=torch.int32)[:, None].expand(-1, 32)
        )
        assert torch.equal(store["position"].view(-1, 32), torch.arange(32, dtype=torch.int32).expand(len(ids), 32))
        first, last = out.hidden_states[0].flatten(0, 1), out.hidden_states[-1].flatten(0, 1)
        entropy = torch.distributions.Categorical(logits=out.logits.flatten(0, 1)).entropy()
        score = -entropy if criterion == "entropy" else torch.cosine_similarity(first, last)
        torch.testing.assert_close(store["score"], score, rtol=1e-4, atol=1e-4)
        if split != "train":
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), store["label"], reduction="none")
            torch.testing.assert_close(store["loss"], loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(passed.head_VD, model.lm_head.weight)
    assert torch.equal(passed.norm_D, model.model.norm.weight)
    assert passed.parameters == sum(p.numel() for p in model.parameters())


def test_training_tokens_get_no_logits_unless_the_criterion_needs_them(tiny_settings, tmp_path, monkeypatch):
    tokens = []
    real = criteria.token_losses
    monkeypatch.setattr(criteria, "token_losses", lambda h, *a, **k: tokens.append(len(h)) or real(h, *a, **k))
    passed, blocks = _pass(tiny_settings, tmp_path, criterion="cosine")
    assert "loss" not in passed.stores["train"]
    assert sum(tokens) == 32 * (len(blocks.splits["val"].blocks()) + len(blocks.splits["test"].blocks()))


@pytest.mark.parametrize(
    ("compute", "stored"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_sixteen_bit_where_the_values_fit(tiny_settings, tmp_path, compute, stored):
    passed, _ = _pass(tiny_settings, tmp_path, dtype=compute)
    assert passed.stores["val"].hidden.dtype == stored
    exact, _ = _pass(tiny_settings, tmp_path / "exact", dtype=compute, store_dtype="float32")
    torch.testing.assert_close(passed.stores["val"].hidden.float(), exact.stores["val"].hidden, rtol=1e-2, atol=1e-2)


def test_values_beyond_float16_are_stored_in_float32(tiny_settings, tmp_path):
    folder = tmp_path / "large"
    model = LlamaForCausalLM(tiny_llama_config())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e8)
    model.save_pretrained(folder)
    find_base(make_settings(tiny_settings)).tokenizer().save_pretrained(folder)
    passed, _ = _pass({**tiny_settings, "base": str(folder)}, tmp_path)
    assert passed.stores["train"].hidden.dtype == torch.float32
    assert torch.isfinite(passed.stores["train"].hidden).all()
    assert passed.stores["train"].hidden.abs().max() > 65504


def test_a_second_run_reuses_the_pass_and_another_setting_does_not(tiny_settings, tmp_path):
    first, _ = _pass(tiny_settings, tmp_path)
    again, _ = _pass({**tiny_settings, "hard_ratio": 0.3, "lr": 1e-5}, tmp_path)
    other, _ = _pass(tiny_settings, tmp_path, criterion="cosine")
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert torch.equal(first.stores["val"].hidden, again.stores["val"].hidden)
    assert torch.equal(first.head_VD, again.head_VD)


def test_a_damaged_pass_is_made_anew(tiny_settings, tmp_path):
    first, _ = _pass(tiny_settings, tmp_path)
    before = first.stores["train"].hidden.clone()
    (path,) = (tmp_path / "cache" / "base-pass").glob("*/train/hidden.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    path.write_bytes(content)
    again, _ = _pass(tiny_settings, tmp_path)
    assert not again.reused
    assert torch.equal(again.stores["train"].hidden, before)


def test_only_the_newest_passes_are_kept(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEEP_PASSES", 2)
    for blocks in (10, 11, 12):
        _pass(tiny_settings, tmp_path, train_blocks=blocks)
    assert len(list((tmp_path / "cache" / "base-pass").iterdir())) == 2


def test_an_interrupted_pass_goes_on_to_the_same_bits(tiny_settings, tmp_path, monkeypatch):
    whole, _ = _pass(tiny_settings, tmp_path / "whole")
    monkeypatch.setattr(fill_store, "SAVE_PROGRESS_SECONDS", 0.0)
    monkeypatch.setitem(fill_store.TOKENS_AT_ONCE, "cpu", 128)
    real, calls = ops.cosine_score, []

    def dies_in_the_seventh_batch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = {**tiny_settings, "criterion": "cosine"}
    reference, _ = _pass(settings, tmp_path / "reference")
    monkeypatch.setattr(ops, "cosine_score", dies_in_the_seventh_batch)
    with pytest.raises(KeyboardInterrupt):
        _pass(settings, tmp_path)
    (folder,) = (tmp_path / "cache" / "base-pass").iterdir()
    assert json.loads((folder / "train" / "progress.json").read_text())["rows"] == 24 * 32  # six batches of four blocks
    resumed, _ = _pass(settings, tmp_path)
    assert len(calls) < 7 + 2 + 16  # the six batches were not run again
    for split, store in reference.stores.items():
        for name, array in store.arrays.items():
            assert torch.equal(resumed.stores[split][name], array), (split, name)
    assert not whole.reused


def test_a_score_that_is_not_finite_names_block_and_position(tiny_settings, tmp_path, monkeypatch):
    real = criteria.token_losses

    def one_nan(hidden, *args, **kwargs):
        loss, score = real(hidden, *args, **kwargs)
        score[3 * 32 + 5] = torch.nan
        return loss, score

    monkeypatch.setattr(criteria, "token_losses", one_nan)
    with pytest.raises(NonFiniteScores, match="not finite, the first at sequence 3, position 5"):
        _pass(tiny_settings, tmp_path)


# --- finding a base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("no/such-model", "not to be had from the Hugging Face Hub"),
        ("./nowhere", "must be a hub id, a folder with a model"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_a_base_that_is_not_there(base, said):
    with pytest.raises(InputError, match=said):
        find_base(make_settings({"base": base}))
    assert not hub_reachable()  # HF_HUB_OFFLINE


def test_folders_that_are_no_base(tmp_path, tiny_settings):
    with pytest.raises(InputError, match=r"the folder has no config\.json"):
        find_base(make_settings({"base": str(tmp_path)}))
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="is a gpt2 model; a cascade needs one of llama, mistral, qwen2, qwen3"):
        find_base(make_settings({"base": str(tmp_path / "gpt2")}))
    tiny_llama_config().save_pretrained(tmp_path / "no-weights")
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        find_base(make_settings({"base": str(tmp_path / "no-weights"), "seq_len": 32}))
    with pytest.raises(InputError, match=r"seq_len: 65; .* has 64 positions"):
        find_base(make_settings({**tiny_settings, "seq_len": 65}))


def test_the_fingerprint_is_of_the_weights(tmp_path, tiny_base):
    same, other = (save_tiny_base(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    prints = [find_base(make_settings({"base": str(p), "seq_len": 32})).fingerprint for p in (tiny_base, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_the_weights_of_a_folder_and_what_lies_beside_them(tmp_path, size):
    """As Mistral's own format beside transformers', whose files of weights are one or several."""
    model = LlamaForCausalLM(tiny_llama_config())
    model.save_pretrained(tmp_path, max_shard_size=size)
    expected = sorted(tmp_path.glob("*.safetensors"))
    assert (len(expected) > 1) == (size == "40KB")
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert weight_files(tmp_path) == expected
    weights = read_weights(tmp_path, torch.float32)
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    expected[-1].unlink()
    with pytest.raises(DamagedFile, match=rf"{expected[-1].name}' is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is damaged: "),
        ("{}", "is damaged: has no weight_map"),
        ('{"weight_map": []}', "is damaged: weight_map must be a map from weights to names of files"),
        ('{"weight_map": {"a": 3}}', "is damaged: weight_map must be a map from weights to names of files"),
        ('{"weight_map": {}}', "is damaged: weight_map is empty"),
    ],
)
def test_an_index_of_weights_that_is_damaged(tmp_path, index, said):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DamagedFile, match=rf"model\.safetensors\.index\.json' {said}"):
        weight_files(tmp_path)


def test_a_base_with_none_of_transformers_weights(tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/consolidated.safetensors")
    base = find_base(make_settings({"base": str(tmp_path / "base"), "seq_len": 32}))
    with pytest.raises(InputError, match=r"base: '.*'; cannot be loaded: '.*/model\.safetensors' is missing"):
        base.load(CPU, torch.float32)


def test_another_family_runs(tiny_settings, tmp_path):
    settings = {k: v for k, v in tiny_llama_config().to_dict().items() if k not in ("model_type", "architectures")}
    model = Qwen3ForCausalLM(Qwen3Config(**{**settings, "head_dim": 16, "tie_word_embeddings": False}))
    model.save_pretrained(tmp_path / "qwen")
    find_base(make_settings(tiny_settings)).tokenizer().save_pretrained(tmp_path / "qwen")
    passed, _ = _pass({**tiny_settings, "base": str(tmp_path / "qwen")}, tmp_path)
    assert torch.equal(passed.head_VD, model.lm_head.weight)
    assert isinstance(passed.stores["train"], HiddenStore)
    assert dataclasses.is_dataclass(passed)
