"""What is measured once, at the end of a run: other text, and the plain model that a second look is merged into."""

import csv
import dataclasses
import json
import math
import shutil

import pytest
import torch
from conftest import byte_tokenizer, english_texts
from safetensors.torch import load_file
from second_look_cases import HOW, copied_stage, passed_by_base
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cascade_fast import evaluate, train
from cascade_fast.base import texts
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.general_text import load_general
from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.splits import SplitSequences, Usage
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.criteria import get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.model.measuring import evaluate_cascade
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.records import RunResults
from cascade_fast.reporting.report import write_report
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits, merged_losses
from cascade_fast.stages.kind import base_needs, get_kind
from cascade_fast.stages.outcome import measure_outcome

CPU = torch.device("cpu")
FLOAT32 = Compute(CPU, torch.float32)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Text of which nothing is in ``tiny_data``: a column of another name beside, texts of their own lengths."""
    path = tmp_path_factory.mktemp("other") / "other.jsonl"
    lengths = [20 + 7 * n % 90 for n in range(60)]
    pieces = english_texts(60, 110, 60_000)
    rows = [{"n": n, "text": piece[:length]} for n, (piece, length) in enumerate(zip(pieces, lengths, strict=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def settings(tiny_base, tiny_data, other, tmp_path_factory):
    """Of a run of one second look of two layers."""
    return {
        "base": str(tiny_base), "dataset": str(tiny_data), "general_dataset": str(other), "seq_len": 32,
        "train_blocks": 40, "val_blocks": 12, "test_blocks": 12, "layers_per_stage": 2, "num_stages": 1, "epochs": 2,
        "batch_tokens": 64, "lr": 3e-3, "warmup_steps": 2, "dtype": "float32", "store_dtype": "float32",
        "device": "cpu", "stage_kind": "second-look", "kv": "store", "accept": "always", "seed": 7,
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """The folder of that run."""
    return run_cascade(make_settings({**settings, "out": str(tmp_path_factory.mktemp("runs") / "look")})).path


def _results(folder):
    return json.loads((folder / "results.json").read_text())


def _general(settings, **changes):
    settings = make_settings({**settings, **changes})
    return load_general(settings, find_base(settings).tokenizer())


def _mean_loss(model, sequences: Sequences) -> float:
    """Of the labelled tokens, sequence by sequence."""
    losses = []
    for number in range(len(sequences)):
        ids, labelled = sequences.ids(number).long(), sequences.labelled(number)
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[labelled])
    return torch.cat(losses).double().mean().item()


def _plain(base_folder, stage_weights) -> LlamaForCausalLM:
    """The base with the stage's layers and norm in the place of its last ones."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    first = len(model.model.layers) - 2
    names = {}
    for name, tensor in stage_weights.items():
        part, _, rest = name.partition(".")
        if part == "layers":
            number, _, rest = rest.partition(".")
            name = f"layers.{first + int(number)}.{rest}"
        names[f"model.{name}"] = tensor
    assert names
    assert not model.load_state_dict(names, strict=False).unexpected_keys
    return model


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_default_is_the_manual_where_that_is_not_trained_on(tiny_settings, tiny_data):
    without = {name: value for name, value in tiny_settings.items() if name != "general_dataset"}
    found = _general(without)
    assert 64 * 32 <= found.tokens < 65 * 32
    assert found.labels == found.tokens
    named = _general(without, general_dataset="pydoc", seed=8, shuffle="off", train_blocks=30)
    assert torch.equal(found.ids_M, named.ids_M)  # the same whatever else is asked
    assert _general(without, dataset="pydoc") is None
    assert _general(without, general_dataset="none") is None
    assert 64 * 32 <= _general(without, dataset="pydoc", general_dataset=str(tiny_data)).tokens < 65 * 32


def test_nothing_of_the_training_text_s_columns_and_templates_applies(settings, other):
    plain = _general(settings)
    table = {"prompt_template": "{question}", "completion_template": "{answer}", "encoding": "cp1252"}
    assert torch.equal(_general(settings, **table).ids_M, plain.ids_M)
    assert torch.equal(_general(settings, text_columns=["q", "a"]).ids_M, plain.ids_M)
    given = [json.loads(line)["text"] for line in other.read_text().splitlines()]
    read = {byte_tokenizer().decode(plain.ids(number)) for number in range(len(plain))}
    assert len([text for text in given if text[:33] in read]) > 20


def test_a_short_text_is_read_whole(settings, other, tmp_path):
    (tmp_path / "short.txt").write_text("Ein kurzer Text, der anders ist.")
    assert _general(settings, general_dataset=str(tmp_path / "short.txt")).tokens == 31


@pytest.mark.parametrize("named", ["the same", "another path", "pydoc"])
def test_the_training_text_is_refused(settings, tiny_data, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tiny_data)
    asked = {"the same": str(tiny_data), "another path": "link.jsonl", "pydoc": "pydoc"}[named]
    changes = {"dataset": "pydoc"} if named == "pydoc" else {}
    with pytest.raises(InputError, match=r"general_dataset: '.*'; is the text that is trained on: must be another one"):
        _general(settings, general_dataset=asked, **changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "general_dataset: 'NAME'; no such file or folder"),
        ("", "general_dataset: 'NAME' is empty"),
        ('{"question": "a", "answer": "b"}\n', "general_dataset: text_columns: not given, and 'NAME' has columns"),
        ('{"text": "a"}\n', "general_dataset: 'NAME': no text has two tokens"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line_before_any_work(settings, tmp_path, capsys, text, said):
    path = tmp_path / "wrong.jsonl"
    if text is not None:
        path.write_text(text)
    asked = {**settings, "general_dataset": str(path), "out": str(tmp_path / "run")}
    flags = [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert said.replace("NAME", str(path)) in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_python_without_its_manual(tiny_settings, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'pydoc_data'")

    monkeypatch.setattr(texts, "pydoc_texts", missing)
    assert _general({**tiny_settings, "general_dataset": None}) is None
    with pytest.raises(InputError, match="general_dataset: 'pydoc'; this Python does not have it"):
        _general({**tiny_settings, "general_dataset": "pydoc"})


def test_a_stream_is_read_no_further_than_needed(settings, tmp_path, monkeypatch):
    rows = [json.dumps({"text": "word " * 40})] * 300 + ["{no JSON"]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    found = _general(settings, general_dataset=str(tmp_path / "long.jsonl"), streaming="on", shuffle_buffer=10)
    assert 64 * 32 <= found.tokens < 65 * 32
    with pytest.raises(InputError, match="general_dataset: "):
        _general(settings, general_dataset=str(tmp_path / "long.jsonl"))


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_rises_are_those_of_transformers(run, settings, tiny_base):
    final, sequences = _results(run)["final"], _general(settings)
    general = final["general"]
    assert (general["dataset"], general["tokens"]) == (settings["general_dataset"], sequences.labels)
    base = _mean_loss(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), sequences)
    cascade = _mean_loss(CascadeForCausalLM.from_pretrained(run), sequences)
    merged = _mean_loss(_plain(tiny_base, load_file(run / "stages/1/model.safetensors")), sequences)
    assert general["base_loss"] == pytest.approx(base, abs=1e-5)
    assert general["rise"] == pytest.approx(cascade - base, abs=1e-5)
    assert general["merged_rise"] == pytest.approx(merged - base, abs=1e-5)
    assert min(abs(general["rise"]), abs(general["merged_rise"]), abs(merged - cascade)) > 1e-3


def _outcome(asked, stage, threshold, passed):
    """Of a cascade of ``stage`` with that threshold."""
    kept = [ExitStage(stage, threshold)]
    how = {"criterion": get_criterion("entropy"), "compute": FLOAT32}
    evaluated = {split: evaluate_exits(kept, passed.stores[split], **how) for split in ("val", "test", "general")}
    return measure_outcome(asked, kept, passed.stores, evaluated, 3, compute=FLOAT32)


@pytest.mark.parametrize("kind", ["append", "second-look"])
def test_with_closed_thresholds_nothing_rises(run, settings, tmp_path, kind):
    asked = make_settings({**settings, "stage_kind": kind, "kv": "auto"})
    base = find_base(asked)
    sequences = dataclasses.replace(load_sequences(asked, base.tokenizer()), general=_general(settings))
    passed = base_pass(base, sequences, asked, base_needs(asked), FLOAT32, tmp_path)
    stage = get_kind(kind).new(asked, base.config, passed, None, 1).eval()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    closed, merged_of_closed = _outcome(asked, stage, -math.inf, passed)
    opened, merged = _outcome(asked, stage, math.inf, passed)
    assert closed.rise == 0.0
    assert abs(opened.rise) > 1e-3
    assert opened.merged_rise == (opened.rise if kind == "second-look" else None)
    assert (merged is None) == (kind == "append")
    # Every token has gone through the stage already, or goes now: the same model.
    assert (closed.merged_rise, merged_of_closed) == (opened.merged_rise, merged)


def test_a_loss_that_is_not_finite_costs_its_number_alone(settings, tmp_path, capsys):
    """As of float16, on tokens that the stage was not trained on; JSON has no NaN."""
    asked = make_settings(settings)
    base = find_base(asked)
    sequences = dataclasses.replace(load_sequences(asked, base.tokenizer()), general=_general(settings))
    passed = base_pass(base, sequences, asked, base_needs(asked), FLOAT32, tmp_path)
    stage = copied_stage(base, passed)
    with torch.no_grad():
        stage.norm.weight.fill_(torch.nan)
    closed = _outcome(asked, stage, -math.inf, passed)
    assert (closed[0].rise, closed[0].merged_rise, closed[1]) == (0.0, None, None)
    assert _outcome(asked, stage, math.inf, passed) == (None, None)
    assert "note: on other text a loss is not finite" in capsys.readouterr().out


def test_nothing_else_of_a_run_changes(run, settings, tmp_path):
    alone = run_cascade(make_settings({**settings, "general_dataset": "none", "out": str(tmp_path / "run")})).path
    ours, theirs = _results(run), _results(alone)
    assert "general" not in theirs["final"]
    same = ("all_token_val_ppl", "all_token_test_ppl", "base_test_ppl", "exit_share", "merged")
    assert [ours["final"][name] for name in same] == [theirs["final"][name] for name in same]
    assert ours["tokens"] == theirs["tokens"]
    for one, two in zip(ours["stages"], theirs["stages"], strict=True):
        losses = [[(e["train_loss"], e["val_loss"]) for e in stage["epochs"]] for stage in (one, two)]
        assert losses[0] == losses[1]
    one, two = (load_file(folder / "stages/1/model.safetensors") for folder in (run, alone))
    assert all(torch.equal(one[name], two[name]) for name in one)
    read = [results["compute"]["base_pass"]["tokens"] for results in (ours, theirs)]
    assert read[0] - read[1] == ours["final"]["general"]["tokens"]


def test_a_resumed_run_has_the_same_numbers_and_the_same_base_pass(run, settings, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "results.json").unlink()  # as if it had been killed at the end
    run_cascade(make_settings({**settings, "out": str(folder), "resume": "auto"}))
    assert _results(folder)["final"]["base_pass_reused"]
    for name in ("general", "merged", "all_token_test_ppl"):
        assert _results(folder)["final"][name] == _results(run)["final"][name]


def test_another_text_is_read_anew(settings, other, tmp_path):
    """It is a part of the base pass, and of its key."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(other.read_text().splitlines(keepends=True)[:9]))
    cache = {**settings, "cache_dir": str(tmp_path / "cache"), "num_stages": 1, "epochs": 1}
    found = []
    for number, general in enumerate([str(other), str(short), "none", str(other)]):
        asked = {**cache, "general_dataset": general, "out": str(tmp_path / str(number))}
        found.append(_results(run_cascade(make_settings(asked)).path)["final"])
    assert [final["base_pass_reused"] for final in found] == [False, False, False, True]
    assert found[0]["general"] == found[3]["general"]
    assert found[1]["general"]["tokens"] < found[0]["general"]["tokens"]
    assert found[1]["all_token_val_ppl"] == found[0]["all_token_val_ppl"]


# --- the merged model ------------------------------------------------------------------------------------------------


def test_only_one_second_look_can_be_merged(tiny_runs):
    shape = object()
    assert [get_kind("second-look").mergeable([shape] * n) for n in range(4)] == [False, True, False, False]
    assert not get_kind("append").mergeable([shape])
    for name in ("warm", "look"):  # two stages each
        assert "merged" not in _results(tiny_runs[name])["final"]


def test_merged_is_the_cascade_with_an_open_threshold(look_settings, tmp_path):
    base, _, passed = passed_by_base(look_settings, tmp_path)
    stage, store = copied_stage(base, passed, noise=0.05), passed.stores["val"]
    opened = evaluate_exits([ExitStage(stage, math.inf)], store, **HOW)
    assert bool((opened.exit_N == 1).all())
    assert torch.equal(merged_losses(stage, store, compute=HOW["compute"]), opened.loss_N)
    assert not torch.equal(opened.loss_N, opened.base_loss_N)


@pytest.mark.parametrize("kv", ["store", "recompute"])
def test_merged_takes_context_through_the_stage_too(look_settings, tiny_base, tmp_path, kv):
    """As a plain model must; an open threshold lets in only what has a label."""
    lengths = [9, 32, 21, 9, 1, 30, 17]
    pieces = english_texts(len(lengths), 40, 900)
    ids = [byte_tokenizer()(text)["input_ids"][: n + 1] for text, n in zip(pieces, lengths, strict=True)]
    sequences = Sequences.from_lists(ids, [[place % 3 == 0 for place in range(n)] for n in lengths])
    settings = make_settings({**look_settings, "kv": kv})
    base, splits = find_base(settings), dict.fromkeys(("train", "val", "test"), sequences)
    given = SplitSequences(splits, "test", Usage())
    passed = base_pass(base, given, settings, base_needs(settings), FLOAT32, tmp_path)
    stage = copied_stage(base, passed, noise=0.05)
    recompute = get_kind("second-look").recompute(settings, base.config, passed, FLOAT32)
    found = merged_losses(stage, passed.stores["val"], compute=FLOAT32, recompute=recompute)
    assert len(found) == sequences.labels < sequences.tokens
    expected = _mean_loss(_plain(tiny_base, stage.state_dict()), sequences)
    assert found.double().mean().item() == pytest.approx(expected, abs=1e-5)
    opened = evaluate_exits([ExitStage(stage, math.inf)], passed.stores["val"], recompute=recompute, **HOW)
    assert abs(opened.loss_N.double().mean().item() - expected) > 1e-4


def test_the_merged_numbers_are_the_plain_model_s(run, settings, tiny_base):
    results = _results(run)
    merged, asked = results["final"]["merged"], make_settings(settings)
    model = _plain(tiny_base, load_file(run / "stages/1/model.safetensors"))
    splits = load_sequences(asked, find_base(asked).tokenizer()).splits
    for split in ("val", "test"):
        expected = math.exp(_mean_loss(model, splits[split]))
        assert merged[f"all_token_{split}_ppl"] == pytest.approx(expected, rel=1e-5)
    assert merged["layers_per_token"] == results["base"]["layers"] == 3


def test_evaluate_has_a_row_of_it(run, settings, tmp_path, capsys):
    files = tmp_path / "all.json", tmp_path / "table.csv"
    argv = [str(run), "--split", "test", "--json", str(files[0]), "--csv", str(files[1]), "--device", "cpu"]
    assert evaluate.main(argv) == 0
    out, final = capsys.readouterr().out, _results(run)["final"]
    base, cascade, merged = json.loads(files[0].read_text())["rows"]
    assert merged["name"] == "merged"
    assert merged["perplexity"] == pytest.approx(final["merged"]["all_token_test_ppl"], rel=1e-5)
    assert merged["difference_low"] <= merged["difference"] <= merged["difference_high"]
    assert (merged["layers_per_token"], merged["flops_per_token"]) == (3, base["flops_per_token"])
    assert cascade["layers_per_token"] > 3
    assert merged["seconds"] is None
    assert "merged: the plain model of base and stage" in out
    with files[1].open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["base", "+ stage 1", "merged"]


def test_evaluate_s_merged_row_takes_context_through_the_stage_too(run, tiny_base):
    ids = [byte_tokenizer()(text)["input_ids"][:25] for text in english_texts(5, 40, 900)]
    sequences = Sequences.from_lists(ids, [[place % 3 == 0 for place in range(24)]] * 5)
    rows = evaluate_cascade(CascadeForCausalLM.from_pretrained(run), sequences, count_flops=False)["rows"]
    model = _plain(tiny_base, load_file(run / "stages/1/model.safetensors"))
    assert rows[2]["perplexity"] == pytest.approx(math.exp(_mean_loss(model, sequences)), rel=1e-5)
    assert rows[2]["flops_per_token"] is None


def test_evaluate_reads_the_other_text_of_the_run(run, tiny_runs, tmp_path, capsys):
    argv = ["--split", "general", "--json", str(tmp_path / "all.json"), "--no-flops", "--device", "cpu"]
    assert evaluate.main([str(run), *argv]) == 0
    rows, general = json.loads((tmp_path / "all.json").read_text())["rows"], _results(run)["final"]["general"]
    losses = [math.log(row["perplexity"]) for row in rows]
    assert losses[0] == pytest.approx(general["base_loss"], abs=1e-5)
    assert [loss - losses[0] for loss in losses[1:]] == pytest.approx(
        [general["rise"], general["merged_rise"]], abs=1e-5
    )
    capsys.readouterr()
    assert evaluate.main([str(tiny_runs["look"]), *argv]) == 2
    assert "split: 'general'; the run has no such text" in capsys.readouterr().err


# --- what is said of them --------------------------------------------------------------------------------------------


def test_report_and_summary_show_both(settings, tmp_path, capsys):
    folder = run_cascade(make_settings({**settings, "out": str(tmp_path / "run")})).path
    said, final, report = capsys.readouterr().out, _results(folder)["final"], (folder / "report.md").read_text()
    merged, general = final["merged"], final["general"]
    layers = 3 + 2 * final["exit_share"]["stage_1"]
    test = merged["all_token_test_ppl"]
    assert f"| merged | {merged['all_token_val_ppl']:.4f} | {test:.4f} | 3.00 |" in report
    assert f"| {final['all_token_test_ppl']:.4f} | {layers:.2f} |" in report
    assert f"| cascade | {general['base_loss'] + general['rise']:.4f} | {general['rise']:+.4f} |" in report
    assert f"{general['merged_rise']:+.4f}" in (folder / "report.html").read_text()
    assert f"{general['tokens']:,} tokens" in said
    assert f"{general['rise']:+.4f}" in said
    assert f"{merged['all_token_val_ppl']:.4f}" in said


@pytest.mark.parametrize("better", [True, False])
def test_the_command_that_merges_is_told_where_that_is_better(run, tmp_path, better):
    folder = shutil.copytree(run, tmp_path / "run")
    results = _results(folder)
    results["final"]["merged"]["all_token_val_ppl"] = results["final"]["all_token_val_ppl"] + (0 if better else 1e-6)
    del results["sha256"]
    (folder / "results.json").write_text(json.dumps(results))
    write_report(folder)
    command = "python -m cascade_fast.export RUN --to FOLDER --format merged"
    assert (command in (folder / "report.md").read_text()) == better


def test_older_results_have_neither(run, tmp_path):
    results = _results(run)
    for name in ("general", "merged"):
        del results["final"][name]
    found = RunResults.from_dict(results)
    assert (found.final.general, found.final.merged, found.better_merged) == (None, None, False)
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "results.json").write_text(json.dumps({n: v for n, v in results.items() if n != "sha256"}))
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "## Merged" not in report
    assert "ther text" not in report
    assert found.to_dict()["final"].keys() == results["final"].keys()
