"""The compute ledger: its FLOPs are those that torch counts, its sums are those of the run."""

import json

import made_records
import pytest
import torch
from conftest import tiny_llama_config
from test_stage_trainer import TOKENS, _trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from cascade_fast.cascade import run_cascade
from cascade_fast.planning.counts import Shape
from cascade_fast.planning.ledger import compute_ledger, seed_flops, stage_work
from cascade_fast.planning.times import base_flops
from cascade_fast.records import SplitTokens
from cascade_fast.settings import make_settings


@pytest.mark.parametrize("preset", ["warm", "seed"])
def test_flops_of_a_step_are_those_counted(tmp_path, preset):
    trainer = _trainer(tmp_path / "run", preset=preset)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(torch.arange(32))
    counts = Shape.from_settings(trainer.settings, tiny_llama_config()).counts
    assert counter.get_total_flops() == 32 * counts.training_flops(128)


def test_flops_of_the_original_recipe_are_those_of_transformers_layers():
    base = tiny_llama_config(tie_word_embeddings=False)
    settings = make_settings({"layers_per_stage": base.num_hidden_layers})
    model = LlamaForCausalLM(base).train()
    hidden_N1D = torch.randn(8, 1, base.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden_N1D, labels=torch.zeros(8, 1, dtype=torch.long), use_cache=False)
        model(inputs_embeds=hidden_N1D).logits.sum().backward()
    forward = counter.get_total_flops() / 4  # two forward passes and a backward pass of two
    inner = base.num_attention_heads * base.head_dim
    attention = base.num_hidden_layers * 4 * inner  # of one key: the ledger leaves it out
    assert 8 * seed_flops(settings, base) / 3 == pytest.approx(forward, abs=8 * attention)


def test_flops_of_the_base_are_those_counted():
    base = tiny_llama_config()
    settings = make_settings({"seq_len": 32})
    model = LlamaForCausalLM(base).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(2, 32, dtype=torch.long))
    attention = base.num_hidden_layers * 4 * 32 * base.num_attention_heads * base.head_dim
    products = counter.get_total_flops()  # torch's counter does not know the CPU's attention
    shape = Shape.from_settings(settings, base)
    assert 64 * (base_flops(shape, 32, with_logits=True) - attention) == products
    without = base_flops(shape, 32, with_logits=True) - base_flops(shape, 32, with_logits=False)
    assert without == 2 * base.vocab_size * base.hidden_size


def test_the_ledger_adds_up():
    base, config = (
        tiny_llama_config(),
        make_settings(
            {"layers_per_stage": 2, "batch_tokens": 32, "criterion": "cosine"}
            | {"train_tokens": 1000, "val_tokens": 100, "test_tokens": 0}
        ),
    )
    epochs = [made_records.epoch(tokens=600, seconds=2.0), made_records.epoch(tokens=600, seconds=1.0)]
    stages = [made_records.stage(compute=stage_work(config, base, epochs, 1e9), epochs=epochs)]
    ledger = compute_ledger(
        config, base, tokens=SplitTokens(train=1000, val=100, test=0), base_pass_seconds=4.0, stages=stages, rate=1e9
    )
    assert ledger.training.tokens == 1200
    assert ledger.training.layer_tokens == 2400
    assert ledger.training.mfu == pytest.approx(
        1200 * Shape.from_settings(config, base).counts.training_flops(128) / 3e9
    )
    shape = Shape.from_settings(config, base)
    without, with_logits = (base_flops(shape, 128, with_logits=logits) for logits in (False, True))
    assert ledger.base_pass.flops == pytest.approx(1000 * without + 100 * with_logits)
    assert ledger.base_pass.layer_tokens == 1100 * base.num_hidden_layers
    compared = ledger.compared
    assert compared.dense_stage.tokens == 2000
    assert compared.dense_stage.flops / compared.stage_1.flops == pytest.approx(2000 / 1200)
    assert compared.seed_recipe.steps == 38
    assert compared.seed_recipe.flops == 1200 * seed_flops(config, base)


def test_a_run_leaves_its_ledger(tiny_settings, tmp_path):
    run = run_cascade(make_settings({**tiny_settings, "out": str(tmp_path / "run")}))
    results = json.loads((run.path / "results.json").read_text())
    stage = results["stages"][0]
    trained = sum(e["tokens"] for e in stage["epochs"])
    assert trained == stage["train_hard"] * len(stage["epochs"]) > TOKENS
    assert stage["compute"]["tokens"] == trained
    assert 0 < stage["compute"]["mfu"] < 1
    assert results["compute"]["base_pass"]["tokens"] == sum(results["tokens"].values())
    assert results["compute"]["training"]["flops"] == sum(s["compute"]["flops"] for s in results["stages"])
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    logged = [line["compute"] for line in lines if line["event"] == "stage"]
    assert logged == [s["compute"] for s in results["stages"]]
    assert "### Compute" in run.report.read_text()
