"""The whole run on a tiny model: the algorithm, its equivalences, and what it leaves behind."""

import json
import math
import sys
from pathlib import Path

import made_records
import pytest
import torch
from conftest import tiny_llama_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from cascade_fast import cascade as module
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.criteria import get_criterion
from cascade_fast.reporting.report import diagnose
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.files import read_json
from cascade_fast.selection import hard_count
from cascade_fast.settings import make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.exits import ExitStage, evaluate_exits, run_stage
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.stage import StageConfig
from cascade_fast.training.trainer import NonFiniteLoss, TrainingHistory, epoch_order

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.naive_loop import naive_losses, naive_stage

CPU = torch.device("cpu")
HOW = {"compute": Compute(CPU, torch.float32)}


def _run(settings, folder, **changes):
    run = run_cascade(make_settings({**settings, "out": str(folder), **changes}))
    return run, read_json(folder / "results.json")


def _stores(settings, tmp_path, **changes):
    settings = make_settings({**settings, **changes})
    base = find_base(settings)
    return base, base_pass(
        base,
        load_sequences(settings, base.tokenizer()),
        settings,
        base_needs(settings),
        Compute(CPU, torch.float32),
        tmp_path / "cache",
    )


# --- the algorithm ---------------------------------------------------------------------------------------------------


def test_a_warm_cascade_helps_and_says_where_everything_is(tiny_settings, tmp_path):
    run, results = _run(tiny_settings, tmp_path / "run")
    base, final = results["base"], results["final"]
    assert set(results) == {"base", "tokens", "settings", "stages", "final", "compute", "memory"}
    assert set(base) >= {"name", "parameters", "layers", "val_ppl"}
    assert results["tokens"] == {"train": 40 * 32, "val": 12 * 32, "test": 12 * 32}
    asked = {**tiny_settings, "test_blocks": 12, "out": str(tmp_path / "run")}  # as many as of validation
    assert results["settings"] == make_settings(asked).to_dict()
    first = results["stages"][0]
    assert set(first) >= {
        "stage", "threshold", "train_hard", "train_total", "val_hard", "added_parameters", "trainable_parameters",
        "epochs", "best_epoch", "best_val_ppl", "seconds", "accepted", "all_token_val_ppl", "exit_share",
    }  # fmt: skip
    assert set(first["epochs"][0]) == {
        "epoch", "tokens", "train_loss", "val_loss", "val_ppl", "seconds", "tokens_per_second", "skipped_steps",
    }  # fmt: skip
    assert first["train_hard"] == hard_count(0.6, 1280)
    assert first["accepted"]
    assert first["all_token_val_ppl"] < base["val_ppl"]
    assert set(first["exit_share"]) == {"base", "stage_1"}
    assert sum(first["exit_share"].values()) == pytest.approx(1.0)
    assert first["exit_share"]["stage_1"] == pytest.approx(first["val_hard"] / 384)
    kept = [s for s in results["stages"] if s["accepted"]]
    assert final["stages_kept"] == len(kept)
    assert final["all_token_val_ppl"] == kept[-1]["all_token_val_ppl"]
    assert final["all_token_test_ppl"] < final["base_test_ppl"]
    assert final["total_parameters"] == base["parameters"] + sum(s["added_parameters"] for s in kept)
    assert final["peak_rss_bytes"] > 10**8
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    stages = {f"stages/{n}/{f}" for n in range(1, len(kept) + 1) for f in ("model.safetensors",)}
    records = {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "report.md",
        "report.html",
        "heat_map.json",
    }
    plots = {"perplexity.png"} if len(results["stages"]) == 2 else set()  # of two points there is none
    assert names - {"run.lock"} == stages | records | plots


def test_records_tie_the_cascade_together(tiny_settings, tmp_path):
    run, results = _run(tiny_settings, tmp_path / "run", num_stages=1)
    config = json.loads((run.path / "config.json").read_text())
    assert config["base"]["fingerprint"] == find_base(make_settings(tiny_settings)).fingerprint
    assert [s["threshold"] for s in config["stages"]] == [results["stages"][0]["threshold"]]
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start", "steps", "epoch", "steps", "epoch", "stage", "end"]
    assert {"torch", "transformers", "python", "cascade_fast"} <= set(config["versions"])
    # What was saved is what was measured.
    base, passed = _stores(tiny_settings, tmp_path)
    shape = StageConfig.from_base(base.config, layers=2, init="identity", head="shared", reads="residual")
    entry = ExitStage.load(run.path / "stages/1", shape, config["stages"][0]["threshold"], passed.head_VD)
    evaluation = evaluate_exits([entry], passed.stores["val"], criterion=get_criterion("entropy"), **HOW)
    assert evaluation.perplexity == results["final"]["all_token_val_ppl"]


def test_the_report_has_the_numbers(tiny_settings, tmp_path):
    run, results = _run(tiny_settings, tmp_path / "run")
    report = run.report.read_text()
    for heading in (
        "Settings",
        "Base model",
        "Stage 1",
        "Overfitting",
        "Thresholds",
        "Validation",
        "Where tokens exit",
        "Parameters",
    ):
        assert f"# {heading}" in report
    first = results["stages"][0]
    assert f"{first['threshold']:.4f}" in report
    assert f"{first['train_hard']:,} / {first['train_total']:,}" in report
    assert f"{results['final']['all_token_test_ppl']:.4f}" in report
    assert f"train_loss={first['epochs'][0]['train_loss']:.4f}" in report
    assert f"{results['final']['total_parameters']:,}" in report
    assert "Rule: " in report
    assert len(results["stages"]) == 2  # so that there are three bars
    assert "![perplexity](perplexity.png)" in report
    assert (run.path / "perplexity.png").read_bytes()[:4] == b"\x89PNG"


def test_same_seed_same_bits_and_another_seed_not(tiny_settings, tmp_path):
    files = [
        _run(tiny_settings, tmp_path / str(i), num_stages=1, seed=seed)[0].path for i, seed in enumerate((7, 7, 8))
    ]
    weights = [(p / "stages/1/model.safetensors").read_bytes() for p in files]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_stage_that_does_not_help_is_rejected_and_ends_the_cascade(tiny_settings, tmp_path):
    run, results = _run(tiny_settings, tmp_path / "run", lr=1.0, warmup_steps=0, num_stages=3)
    assert len(results["stages"]) == 1
    stage = results["stages"][0]
    assert not stage["accepted"]
    assert stage["verdict"].startswith("rejected, the cascade ends before it: all-token validation perplexity")
    assert results["final"]["stages_kept"] == 0
    assert results["final"]["all_token_val_ppl"] == results["base"]["val_ppl"]
    assert results["final"]["all_token_test_ppl"] == results["final"]["base_test_ppl"]
    assert results["final"]["total_parameters"] == results["base"]["parameters"]
    assert not (run.path / "stages").exists()


def test_the_margin_decides(tiny_settings, tmp_path):
    _, results = _run(tiny_settings, tmp_path / "run", min_improvement=0.9)
    assert not results["stages"][0]["accepted"]
    assert results["stages"][0]["all_token_val_ppl"] < results["base"]["val_ppl"]


def test_the_test_blocks_are_looked_at_once_at_the_end(tiny_settings, tmp_path, monkeypatch):
    looked = []
    real = module.evaluate_exits
    monkeypatch.setattr(
        module,
        "evaluate_exits",
        lambda stages, store, **how: looked.append(store.folder.name) or real(stages, store, **how),
    )
    _run(tiny_settings, tmp_path / "run")
    assert looked[looked.index("test") :] == ["test", "val", "test"]  # of the cascade, then of the base


def test_time_is_up(tiny_settings, tmp_path):
    _, results = _run(tiny_settings, tmp_path / "run", max_minutes=1e-9, epochs=50)
    assert [s["stopped"] for s in results["stages"]] == ["time is up"]
    assert len(results["stages"][0]["epochs"]) == 1


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float32", "Try a lower --lr, --warmup-steps 100 or --grad-clip 1$"),
        ("float16", "Try --dtype float32 .*, a lower"),
    ],
)
def test_a_loss_that_is_not_finite_stops_keeps_the_best_and_says_what_to_try(
    tiny_settings, tmp_path, monkeypatch, dtype, advice
):
    from cascade_fast.training import trainer

    real, steps = trainer.linear_cross_entropy, []

    def explodes_in_epoch_two(*args, **kwargs):
        steps.append(1)
        return real(*args, **kwargs) * (math.inf if len(steps) > 12 else 1.0)

    monkeypatch.setattr(trainer, "linear_cross_entropy", explodes_in_epoch_two)
    with pytest.raises(NonFiniteLoss, match=f"the loss is not finite.*{advice}"):
        _run(tiny_settings, tmp_path / "run", dtype=dtype)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (stage,) = results["stages"]
    assert (stage["best_epoch"], stage["accepted"], stage["stopped"]) == (1, True, "non-finite loss")
    weights = load_file(tmp_path / "run" / "stages/1/model.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())


# --- equivalences ----------------------------------------------------------------------------------------------------


def _entries(base, passed, thresholds, randomise=True):
    shape = StageConfig.from_base(base.config, layers=2, init="identity", head="shared", reads="residual")
    entries = []
    for number, threshold in enumerate(thresholds):
        stage = AppendedStage(shape, head_VD=passed.head_VD, norm_D=passed.norm_D, seed=number)
        if randomise:
            for parameter in stage.parameters():
                nn.init.normal_(parameter, std=0.2)
        entries.append(ExitStage(stage.eval(), threshold))
    return entries


def test_nothing_selected_is_the_base_exactly(tiny_settings, tmp_path):
    base, passed = _stores(tiny_settings, tmp_path)
    val = passed.stores["val"]
    evaluation = evaluate_exits(_entries(base, passed, [-math.inf] * 2), val, criterion=get_criterion("entropy"), **HOW)
    assert torch.equal(evaluation.loss_N, val["loss"])
    assert evaluation.shares(2) == {"base": 1.0, "stage_1": 0.0, "stage_2": 0.0}


@pytest.mark.parametrize("criterion", ["entropy", "cosine"])
def test_everything_selected_is_every_stage_in_a_row(tiny_settings, tmp_path, criterion):
    base, passed = _stores(tiny_settings, tmp_path, criterion=criterion, store_dtype="float32")
    val, entries = passed.stores["val"], _entries(base, passed, [math.inf] * 2)
    evaluation = evaluate_exits(entries, val, criterion=get_criterion(criterion), **HOW)
    with torch.no_grad():
        _, normed = entries[1].stage(entries[0].stage(val.hidden)[0])
        expected = nn.functional.cross_entropy(normed @ passed.head_VD.T, val["label"], reduction="none")
    torch.testing.assert_close(evaluation.loss_N, expected, rtol=1e-4, atol=1e-4)
    assert evaluation.shares(2)["stage_2"] == 1.0


def test_tokens_exit_where_their_score_says(tiny_settings, tmp_path):
    base, passed = _stores(tiny_settings, tmp_path, store_dtype="float32")
    val = passed.stores["val"]
    entries = _entries(base, passed, [val["score"].median().item(), 0.0])
    arriving = run_stage(entries[0].stage, val.hidden, val["label"], criterion=get_criterion("entropy"), **HOW).score_K
    entries[1] = ExitStage(entries[1].stage, arriving.median().item())
    evaluation = evaluate_exits(entries, val, criterion=get_criterion("entropy"), **HOW)
    for token in range(0, len(val), 7):  # one by one, as on paper
        hidden, loss, exit_ = val.hidden[token : token + 1], val["loss"][token], 0
        score = val["score"][token]
        for number, entry in enumerate(entries, 1):
            if score > entry.threshold:
                break
            hidden, normed = entry.stage(hidden)
            logits = normed @ passed.head_VD.T
            loss, exit_ = nn.functional.cross_entropy(logits, val["label"][token : token + 1]), number
            score = -torch.distributions.Categorical(logits=logits).entropy()
        assert evaluation.exit_N[token] == exit_
        torch.testing.assert_close(evaluation.loss_N[token], loss.detach().squeeze(), rtol=1e-4, atol=1e-4)
    assert len(set(evaluation.exit_N.tolist())) == 3


def test_an_untrained_warm_cascade_is_the_base(tiny_settings, tmp_path):
    base, passed = _stores(tiny_settings, tmp_path)
    entries = _entries(base, passed, [math.inf, math.inf], randomise=False)
    evaluation = evaluate_exits(entries, passed.stores["val"], criterion=get_criterion("entropy"), **HOW)
    torch.testing.assert_close(evaluation.loss_N, passed.stores["val"]["loss"], rtol=2e-3, atol=2e-3)  # 16-bit store


def test_all_selected_is_dense_training(tiny_settings, tmp_path):
    _, results = _run(tiny_settings, tmp_path / "run", hard_ratio=1.0, num_stages=1)
    (stage,) = results["stages"]
    assert (stage["train_hard"], stage["train_total"]) == (1280, 1280)
    assert stage["all_token_val_ppl"] <= results["base"]["val_ppl"]


# --- the original recipe ---------------------------------------------------------------------------------------------


def test_the_seed_preset_trains_as_the_naive_loop_does(tiny_settings, tmp_path):
    """Its first 20 losses are those of a plain Hugging Face loop, from the same weights and order."""
    settings = {k: v for k, v in tiny_settings.items() if k not in ("lr", "warmup_steps", "batch_tokens", "epochs")}
    settings = make_settings(
        {
            **settings,
            "preset": "seed",
            "out": str(tmp_path / "run"),
            "num_stages": 1,
            "hard_ratio": 0.6,
            "train_blocks": 40,
            "epochs": 1,
        }
    )
    from cascade_fast.training import trainer

    losses: list[float] = []
    initial: dict[str, torch.Tensor] = {}
    real_step, real_stage = trainer.linear_cross_entropy, module.CascadeRun._new_stage

    def record_loss(*args, **kwargs):
        loss = real_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    def record_stage(self, number):
        stage = real_stage(self, number)
        initial.update({name: t.clone() for name, t in stage.state_dict().items()})
        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "linear_cross_entropy", record_loss)
        patch.setattr(module.CascadeRun, "_new_stage", record_stage)
        run_cascade(settings)

    model = AutoModelForCausalLM.from_pretrained(tiny_settings["base"], dtype=torch.float32)
    ids = load_sequences(settings, find_base(settings).tokenizer()).splits["train"].blocks().long()
    with torch.no_grad():
        states = model(ids[:, :-1], output_hidden_states=True).hidden_states
    first, last = states[0].flatten(0, 1), states[-1].flatten(0, 1)
    cosine = (first * last).sum(-1) / (first.norm(dim=-1) * last.norm(dim=-1) + 1e-8)
    hard = cosine <= torch.quantile(cosine, 0.6)
    order = epoch_order(int(hard.sum()), seed=7, stage=1, epoch=1).split(32)
    stage = naive_stage(model.config, layers=settings.layers_per_stage)
    names = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in initial.items()}
    stage.load_state_dict({**names, "model.embed_tokens.weight": names["lm_head.weight"]})
    expected = naive_losses(stage, last[hard], ids[:, 1:].flatten()[hard], order)
    assert len(losses) >= 20
    assert losses[:20] == pytest.approx(expected[:20], abs=1e-4)


def test_the_seed_preset_s_counts_at_the_seed_s_sizes(tmp_path, monkeypatch):
    """128,000 training and 12,800 validation tokens through three stages; only the counts matter, so nothing learns."""
    from conftest import byte_tokenizer, english_texts
    from transformers import LlamaForCausalLM

    folder = tmp_path / "base"
    LlamaForCausalLM(
        tiny_llama_config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, max_position_embeddings=128)
    ).save_pretrained(folder)  # fmt: skip
    byte_tokenizer().save_pretrained(folder)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in english_texts(1110, 300)))
    monkeypatch.setattr(
        module.StageTrainer, "run", lambda self: TrainingHistory(best_epoch=1, best_val_loss=1.0, stopped="stub")
    )
    run, results = _run(
        {
            "preset": "seed",
            "base": str(folder),
            "dataset": str(data),
            "num_stages": 3,
            "layers_per_stage": 1,
            "device": "cpu",
        },
        tmp_path / "run",
    )
    assert [(s["train_hard"], s["train_total"]) for s in results["stages"]] == [
        (115_200, 128_000), (103_680, 115_200), (93_312, 103_680),
    ]  # fmt: skip
    assert [s["val_hard"] for s in results["stages"]] == [11_520, 10_368, 9_331]
    assert all(s["accepted"] for s in results["stages"])
    assert "kept, as the preset keeps every stage" in run.report.read_text().lower()


# --- the report's words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([4.7186, 4.4359, 4.4788], "mild overfitting"),  # the original's stage 1
        ([4.5288, 4.5792], "clear overfitting"),  # and its stage 2
        ([3.0, 2.5, 2.4], "none seen"),
        ([3.0], "not to be told from one epoch"),
    ],
)
def test_the_overfitting_rule(losses, said):
    assert diagnose([made_records.epoch(val_loss=loss) for loss in losses]) == said


# --- the exit threshold of a stage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["append", "second-look"])
def test_the_door_that_serves_validation_best(tiny_settings, tmp_path, kind):
    changes = {"hard_ratio": 0.3, "num_stages": 1, "stage_kind": kind, "layers_per_stage": 1, "lr": 2e-3}
    _, trained = _run(tiny_settings, tmp_path / "trained", **changes)
    _, chosen = _run(tiny_settings, tmp_path / "chosen", **changes, exit_threshold="validation")
    before, after = trained["stages"][0], chosen["stages"][0]
    assert before["exit_threshold"] == before["threshold"] == after["threshold"]
    assert before["epochs"][0]["val_loss"] == after["epochs"][0]["val_loss"]  # training is the same
    assert after["exit_threshold"] > after["threshold"]
    assert after["all_token_val_ppl"] < before["all_token_val_ppl"]
    assert after["exit_share"]["stage_1"] > before["exit_share"]["stage_1"]
    assert chosen["final"]["all_token_val_ppl"] == after["all_token_val_ppl"]
    kept = json.loads((tmp_path / "chosen" / "config.json").read_text())
    assert kept["stages"][0]["threshold"] == after["exit_threshold"]


def test_the_door_is_there_again_after_a_resume(tiny_settings, tmp_path, monkeypatch):
    changes = {"hard_ratio": 0.3, "num_stages": 2, "exit_threshold": "validation", "accept": "always"}
    _, whole = _run(tiny_settings, tmp_path / "whole", **changes)
    assert whole["stages"][0]["accepted"]

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.CascadeRun, "_advance", stop)
        with pytest.raises(KeyboardInterrupt):
            _run(tiny_settings, tmp_path / "run", **changes)
    _, resumed = _run(tiny_settings, tmp_path / "run", **changes, resume="auto")
    for a, b in zip(whole["stages"], resumed["stages"], strict=True):
        for key in ("threshold", "exit_threshold", "all_token_val_ppl", "exit_share", "val_hard"):
            assert a[key] == b[key], key
