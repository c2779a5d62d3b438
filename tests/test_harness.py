"""lm-evaluation-harness on a tiny cascade: the numbers are the model's own, and the example's command runs."""

import importlib.util
import logging
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_base

from cascade_fast import harness
from cascade_fast.input_checks import InputError
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.settings import make_settings

EXAMPLE = Path(__file__).parent.parent / "examples/lm_eval"
# lm_eval is in the extra `dev`: without it these tests fail, they are not skipped.


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A finished run on a base with room for the example's documents at one token a byte."""
    from cascade_fast.cascade import run_cascade

    folder = tmp_path_factory.mktemp("harness")
    settings = {
        "base": str(save_tiny_base(folder / "base", max_position_embeddings=2048)),
        "dataset": str(tiny_data),
        "out": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "seq_len": 32,
        "train_blocks": 40,
        "val_blocks": 12,
        "layers_per_stage": 1,
        "epochs": 1,
        "batch_tokens": 64,
        "lr": 3e-3,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "accept": "always",
    }
    return run_cascade(make_settings(settings)).path


def _requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def _lm(run: Path, **options):
    harness.register()
    from lm_eval.api.registry import get_model

    return get_model("cascade").create_from_arg_obj({"pretrained": str(run), **options}, {"batch_size": 3})


@pytest.mark.parametrize("exits", ["all", "base", 1])
def test_log_likelihoods_are_the_model_s_own(run, exits):
    lm = _lm(run, exits=exits)
    model = CascadeForCausalLM.from_pretrained(run).eval()
    closed = {"all": 0, "base": 2, 1: 1}[exits]
    thresholds = model.config.thresholds[: 2 - closed] + [-math.inf] * closed
    texts = [
        "The class statement defines a class.",
        "An expression",
        "If the object is a method, its name is looked up",
    ]
    rolling = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True)
    for text, found in zip(texts, rolling, strict=True):
        ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
        with torch.no_grad():
            loss = model(ids, labels=ids, thresholds=thresholds).loss
        assert found == pytest.approx(-loss.item() * (ids.shape[1] - 1), rel=1e-5)
    ((pair, _),) = lm.loglikelihood(_requests("loglikelihood", (texts[1], " is evaluated")), disable_tqdm=True)
    context = torch.tensor([lm.tok_encode(texts[1] + " is evaluated")])
    labels = context.clone()
    labels[:, : len(lm.tok_encode(texts[1]))] = -100
    with torch.no_grad():
        loss = model(context, labels=labels, thresholds=thresholds).loss
    assert pair == pytest.approx(-loss.item() * (labels != -100).sum().item(), rel=1e-5)


def test_the_exits_differ_and_generation_uses_them(run):
    found, said = {}, {}
    for exits in ("base", "all"):
        lm = _lm(run, exits=exits)
        (found[exits],) = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", ("The class",)), True)
        (said[exits],) = lm.generate_until(
            _requests("generate_until", ("The class", {"until": [], "max_gen_toks": 12})), disable_tqdm=True
        )
        ids = torch.tensor([lm.tok_encode("The class")])
        direct = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, thresholds=lm.thresholds
        )
        assert lm.tok_decode(direct[0, ids.shape[1] :]) == said[exits]
    assert found["base"] != found["all"]


@pytest.mark.parametrize(("option", "value"), [("exits", "some"), ("exits", 3), ("exits", -1), ("dtype", "int8")])
def test_bad_options_are_named(run, option, value):
    with pytest.raises(InputError, match=f"{option}: .*must be"):
        _lm(run, **{option: value})


def test_the_example_prints_base_and_cascade(run, capsys):
    logger = logging.getLogger("lm_eval")
    before = logger.level
    compare = runpy.run_path(str(EXAMPLE / "compare.py"))
    try:
        compare["main"]([str(run), "--limit", "3"])
    finally:
        logger.setLevel(before)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| pydoc")]
    assert [row[2] for row in rows] == ["word_perplexity", "byte_perplexity", "bits_per_byte", "acc", "acc_norm"]
    assert rows[1][3] != rows[1][4]
    assert 1 < float(rows[1][3]) < 256  # bytes
    assert 0 <= float(rows[3][3]) <= 1


def test_the_example_s_documents():
    spec = importlib.util.spec_from_file_location("pydoc_task", EXAMPLE / "pydoc_task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    rows = task.continuations()["test"]
    assert rows.to_list() == task.continuations()["test"].to_list()
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert len(task.pieces()["test"]) > 20


def test_the_command_line_is_lm_eval_s(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--help"])
    with pytest.raises(SystemExit) as end:
        harness.main()
    assert end.value.code == 0
    assert "--model_args" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line_on_a_run(run, tmp_path):
    command = [sys.executable, "-m", "cascade_fast.harness", "--model", "cascade", "--include_path", str(EXAMPLE)]
    command += ["--tasks", "pydoc_choice", "--limit", "2", "--model_args"]
    done = subprocess.run([*command, f"pretrained={run},exits=base"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pydoc_choice" in done.stdout
    done = subprocess.run([*command, f"pretrained={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: config.json: model_type None; must be 'cascade'")


def test_without_lm_eval_the_answer_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert harness.main() == 2
    assert "pip install lm-eval" in capsys.readouterr().err
