"""Evaluation: its numbers are training's, what it counts is what ran, and the command line writes what it says."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from cascade_fast import evaluate
from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import all_sequences, load_sequences
from cascade_fast.model import evaluation_text
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.measuring import bootstrap_difference, evaluate_cascade, measure, sweep_threshold
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.settings import RunSettings, make_settings


@pytest.fixture(params=["warm", "seed", "look"])
def run(request, tiny_runs):
    return tiny_runs[request.param]


def _loaded(run, split="val"):
    settings = make_settings(json.loads((run / "config.json").read_text())["settings"])
    sequences = load_sequences(settings, find_base(settings).tokenizer()).splits[split]
    return CascadeForCausalLM.from_pretrained(run).requires_grad_(False), sequences


def test_the_rows_are_the_run_s_numbers(run):
    model, sequences = _loaded(run)
    results = json.loads((run / "results.json").read_text())
    found = evaluate_cascade(model, sequences, batch_tokens=100)
    rows = found["rows"]
    assert [row["name"] for row in rows] == ["base", "+ stage 1", "+ stages 1-2"]
    expected = [results["base"]["val_ppl"], *(s["all_token_val_ppl"] for s in results["stages"])]
    assert [row["perplexity"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert rows[2]["exit_share"] == pytest.approx(list(results["final"]["exit_share"].values()))
    assert all(0 < row["accuracy"] < 1 and row["seconds"] > 0 for row in rows)
    for row in rows:
        assert row["difference"] == pytest.approx(row["perplexity"] - rows[0]["perplexity"])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert (rows[0]["difference_low"], rows[0]["difference_high"]) == (0, 0)


def test_layers_are_those_that_ran(run):
    model, sequences = _loaded(run)
    for row in evaluate_cascade(model, sequences, count_flops=False)["rows"]:
        shares = row["exit_share"]
        # The tiny base has three layers, a stage two; a token in stage 2 has been through stage 1.
        assert row["layers_per_token"] == pytest.approx(3 + 2 * shares[1] + 4 * shares[2])
        assert row["flops_per_token"] is None
    assert not any(layer._forward_hooks for layer in model.base.model.layers)


def test_flops_are_those_of_the_matrix_products_that_ran(run):
    model, sequences = _loaded(run)
    products = [0]

    def add(linear, args, _output):
        products[0] += 2 * args[0].shape[:-1].numel() * linear.in_features * linear.out_features

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add)
    looked = [0]
    if model.config.kind == "second-look":  # every query of a pack, padded to the most of one sequence, to 32 keys

        def add_attention(_stage, args, _output):
            looked[0] += len(args[0].kv_BSL2GE) * 2 * 4 * 2 * (2 * args[0].queries * 32 * 8)

        for stage in model.stages:
            stage.register_forward_hook(add_attention)
    tokens = len(sequences) * 32
    # Scores and weighted values: two products of 32 x 32 for each of 4 heads of size 8, in 3 layers.
    attention = len(sequences) * 3 * 4 * 2 * (2 * 32 * 32 * 8)
    for thresholds in ([-math.inf] * 2, model.config.thresholds, [math.inf] * 2):
        products[0] = looked[0] = 0
        measured = measure(model, sequences, thresholds, count_flops=True)
        assert measured.flops == products[0] + attention + looked[0]
        assert len(measured.loss_N) == tokens


def test_the_easy_and_the_hard_apart(run):
    model, sequences = _loaded(run)
    found = evaluate_cascade(model, sequences, count_flops=False)
    exits, rows = found["exits"], found["rows"]
    assert [row["exit"] for row in exits] == ["base", "stage 1"]
    tokens = len(sequences) * 32
    assert exits[0]["easy_tokens"] + exits[0]["hard_tokens"] == tokens
    assert exits[1]["easy_tokens"] + exits[1]["hard_tokens"] == exits[0]["hard_tokens"]

    def together(row, hard):
        parts = [(row["easy_tokens"], row["easy_perplexity"]), (row["hard_tokens"], row[hard])]
        return math.exp(sum(n * math.log(ppl) for n, ppl in parts) / sum(n for n, _ in parts))

    # The base's parts make up all tokens: had all left at the base, and where they did leave.
    assert together(exits[0], "hard_perplexity_here") == pytest.approx(rows[0]["perplexity"], rel=1e-5)
    assert together(exits[0], "hard_perplexity_at_its_exit") == pytest.approx(rows[2]["perplexity"], rel=1e-5)
    arrived = together(exits[1], "hard_perplexity_at_its_exit")
    assert arrived == pytest.approx(exits[0]["hard_perplexity_at_its_exit"], rel=1e-5)


def test_the_bootstrap_s_interval():
    generator = torch.Generator().manual_seed(1)
    base = 3 + torch.randn(200, 16, generator=generator) * 0.5
    better = base - 0.1 + torch.randn(200, 16, generator=generator) * 0.3
    number_N = torch.arange(200).repeat_interleave(16)
    low, high = bootstrap_difference(better.flatten(), base.flatten(), number_N)
    truth = (better.double().mean().exp() - base.double().mean().exp()).item()
    assert low < truth < high < 0
    # Against the normal approximation: exp(mean) varies by exp(mean) times the mean's standard error.
    scale = better.double().mean().exp() * better.double().mean(1) - base.double().mean().exp() * base.double().mean(1)
    assert high - low == pytest.approx(2 * 1.96 * scale.std().item() / 200**0.5, rel=0.15)
    assert bootstrap_difference(better.flatten(), base.flatten(), number_N) == (low, high)
    assert all(math.isnan(x) for x in bootstrap_difference(better[0], base[0], number_N[:16]))


def test_the_bootstrap_draws_whole_sequences_of_any_length():
    """Against the definition, draw by draw: a sequence counts with all of its tokens."""
    count_B, loss_N, base_N = torch.tensor([5, 3, 3, 1]), torch.rand(12), torch.rand(12)
    found = bootstrap_difference(loss_N, base_N, torch.tensor([0, 2, 3, 7]).repeat_interleave(count_B), samples=50)
    drawn = torch.randint(4, (50, 4), generator=torch.Generator().manual_seed(0)).tolist()
    losses, bases = loss_N.split(count_B.tolist()), base_N.split(count_B.tolist())
    differences = [
        (torch.cat([losses[n] for n in one]).mean().exp() - torch.cat([bases[n] for n in one]).mean().exp()).item()
        for one in drawn
    ]
    expected = torch.quantile(torch.tensor(differences), torch.tensor([0.025, 0.975])).tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_sweep_goes_from_the_base_to_every_token(run):
    model, sequences = _loaded(run)
    rows = sweep_threshold(model, sequences, points=4)
    assert len(rows) == 5
    assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
    entered = [1 - row["exit_share"][0] for row in rows if not row["trained"]]
    assert entered == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.005)
    assert [row["flops_per_token"] for row in rows] == sorted(row["flops_per_token"] for row in rows)
    whole = evaluate_cascade(model, sequences, count_flops=False)["rows"]
    assert rows[0]["perplexity"] == pytest.approx(whole[0]["perplexity"])
    (trained,) = (row for row in rows if row["trained"])
    assert trained["perplexity"] == pytest.approx(whole[2]["perplexity"])
    with pytest.raises(ValueError, match="points: 1"):
        sweep_threshold(model, sequences, points=1)


def test_all_sequences_of_a_text(tiny_settings):
    settings = make_settings({**tiny_settings, "seq_len": 50})
    tokenizer = find_base(settings).tokenizer()
    blocks = all_sequences(settings, tokenizer).blocks()
    texts = [json.loads(line)["text"] for line in Path(settings.dataset).read_text().splitlines()]
    assert blocks.shape == (sum((len(tokenizer(text)["input_ids"]) - 1) // 50 for text in texts), 51)
    assert torch.equal(all_sequences(settings, tokenizer, limit=7).blocks(), blocks[:7])
    train = load_sequences(dataclasses.replace(settings, shuffle="off"), tokenizer).splits["train"]
    assert torch.equal(blocks[:39], train.blocks()[:39])


def _main(capsys, *argv):
    code = evaluate.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_writes_what_it_says(run, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("all.json", "table.csv", "sweep.csv")}
    code, out, err = _main(
        capsys, run, "--split", "test", "--json", files["all.json"], "--csv", files["table.csv"],
        "--sweep-threshold", files["sweep.csv"], "--sweep-points", "3", "--device", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    results = json.loads((run / "results.json").read_text())["final"]
    found = json.loads(files["all.json"].read_text())
    assert found["rows"][0]["perplexity"] == pytest.approx(results["base_test_ppl"], rel=1e-5)
    assert found["rows"][2]["perplexity"] == pytest.approx(results["all_token_test_ppl"], rel=1e-5)
    assert found["data"]["tokens"] == 384
    lines = out.splitlines()
    tables = lines[1 : next(n for n, line in enumerate(lines) if line.startswith("curve: "))]
    assert max(map(len, tables)) <= 100  # no table is wider than 80, its titles are sentences
    (row,) = (line for line in lines if line.startswith("+ stages 1-2") and "to" in line)
    assert row.split()[3] == f"{results['all_token_test_ppl']:.4f}"
    with files["table.csv"].open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in table] == [row["perplexity"] for row in found["rows"]]
    assert [float(row["exit_2"]) for row in table] == [row["exit_share"][2] for row in found["rows"]]
    with files["sweep.csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(found["sweep"]) == 4
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_another_text_and_a_saved_cascade(tiny_runs, tiny_data, tmp_path, capsys):
    CascadeForCausalLM.from_pretrained(tiny_runs["warm"]).save_pretrained(tmp_path / "saved")
    how = ["--dataset", tiny_data, "--blocks", "9", "--seq-len", "40", "--no-flops", "--device", "cpu"]
    outputs = []
    for folder in (tiny_runs["warm"], tmp_path / "saved"):
        code, _, _ = _main(capsys, folder, *how, "--json", tmp_path / "all.json")
        assert code == 0
        outputs.append(json.loads((tmp_path / "all.json").read_text()))
    assert outputs[0]["data"]["tokens"] == 360
    assert outputs[0]["exits"] == outputs[1]["exits"]
    assert outputs[0]["rows"][2]["flops_per_token"] is None


def test_another_text_is_read_as_asked_and_its_labels_are_counted(tiny_runs, monkeypatch, tmp_path, capsys):
    asked = []

    def all_sequences(settings, _tokenizer, limit):
        asked.append(settings)
        ids, marks = [list(range(1, n + 2)) for n in (9, 20, 14)], [[n >= 6 for n in range(m)] for m in (9, 20, 14)]
        return Sequences.from_lists(ids[:limit], marks[:limit])

    monkeypatch.setattr(evaluation_text, "all_sequences", all_sequences)
    prompts = ["--prompt-template", "{q}", "--completion-template", "{a}", "--encoding", "latin-1"]
    how = ["--dataset", "other.csv", "--device", "cpu", "--json", tmp_path / "all.json"]
    code, out, err = _main(capsys, tiny_runs["look"], *how, *prompts, "--loss-on", "all", "--blocks", 2)
    assert (code, err) == (0, "")
    first, *_ = out.splitlines()
    assert "other.csv, 2 sequences of their own lengths, 29 tokens, 17 (58.6%) with a label" in first
    assert "tokens with a label, each at its own exit" in out
    assert "layers and GFLOP a token, context included" in out
    data = json.loads((tmp_path / "all.json").read_text())["data"]
    assert data == {"source": "other.csv", "sequences": 2, "longest": 20, "tokens": 29, "labelled": 17}
    assert _main(capsys, tiny_runs["look"], *how, "--chat-template", "t.jinja", "--no-flops")[0] == 0
    assert [(s.prompt_template, s.completion_template, s.encoding) for s in asked] == [
        ("{q}", "{a}", "latin-1"),
        (None, None, "utf-8"),
    ]
    assert [(s.loss_on, s.chat_template) for s in asked] == [("all", None), ("assistant", "t.jinja")]


def test_a_text_s_names_are_not_carried_over_to_another():
    """But what the cascade was trained to say, and how a chat is written, are."""
    trained = {"dataset": "chats.csv", "prompt_template": "{q}", "completion_template": "{a}", "encoding": "latin-1"}
    config = CascadeConfig(settings={**trained, "chat_template": "t.jinja", "loss_on": "all"})
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        found = Sequences.from_lists([[1, 2]])
        patch.setattr(evaluation_text, "all_sequences", lambda s, *_: asked.append(s) or found)
        evaluation_text.evaluation_text(config, None, dataset="other.jsonl", text_columns=["text"])
    (settings,) = asked
    assert (settings.prompt_template, settings.completion_template, settings.encoding) == (None, None, "utf-8")
    assert (settings.text_columns, settings.chat_template, settings.loss_on) == (("text",), "t.jinja", "all")


def test_evaluate_has_the_flags_of_training_that_name_a_text():
    flags = {action.dest: action for action in evaluate.build_parser()._actions}
    assert set(evaluate.TEXT_FLAGS) <= set(flags)
    assert set(evaluate.TEXT_FLAGS) <= {f.name for f in dataclasses.fields(RunSettings)}
    without_flag = {"streaming"}  # another text is read as a whole
    assert set(evaluation_text.OF_ONE_DATASET) - without_flag < set(evaluate.TEXT_FLAGS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--blocks", "0"], "blocks: 0; must be at least 1"),
        (["--batch-tokens", "0"], "batch_tokens: 0; must be at least 1"),
        (["--text-columns", "text"], "text_columns: ['text']; is of --dataset, which is not given"),
        (["--loss-on", "all"], "loss_on: 'all'; is of --dataset, which is not given"),
        (["--dataset", "no-such.json"], "dataset: 'no-such.json'; no such file or folder"),
        (["--seq-len", "4000"], "seq_len: 4000; the base has 64 positions"),
        (["--json", "no/such/folder/x.json"], "json: 'no/such/folder/x.json'; its folder does not exist"),
        (["--sweep-threshold", "x.csv", "--sweep-points", "1"], "sweep_points: 1; must be at least 2"),
    ],
)
def test_a_mistake_is_one_line(tiny_runs, capsys, wrong, said):
    code, _, err = _main(capsys, tiny_runs["warm"], *wrong)
    assert (code, said in err, len(err.strip().splitlines())) == (2, True, 1)


def test_a_cascade_that_kept_no_stage(tiny_settings, tmp_path, capsys):
    from cascade_fast.cascade import run_cascade

    run_cascade(make_settings({**tiny_settings, "out": str(tmp_path / "run"), "min_improvement": 0.9}))
    capsys.readouterr()
    assert _main(capsys, tmp_path / "run", "--json", tmp_path / "all.json", "--device", "cpu")[0] == 0
    found = json.loads(Path(tmp_path / "all.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["base"]
    assert found["exits"] == []
    code, _, err = _main(capsys, tmp_path / "run", "--sweep-threshold", tmp_path / "s.csv")
    assert (code, "kept no stage" in err) == (2, True)
