"""The plan of a run on several GPUs: shares of text and batch, all-reduces, and when a stage must be sharded."""

import json

import pytest
from test_plan import SMALL

from cascade_fast.plan import main
from cascade_fast.planning.base_configs import base_configuration
from cascade_fast.planning.counts import Shape
from cascade_fast.planning.devices import DEVICES
from cascade_fast.planning.memory import GIB
from cascade_fast.planning.plan import make_plan
from cascade_fast.selection import hard_count
from cascade_fast.settings import make_settings

TEXT = {"train_tokens": 2**22, "val_tokens": 2**14, "test_tokens": 0, "general_dataset": "none", "num_stages": 1}
TRAINED = 41_943_040  # of LoRA on llama-3-8b


def test_each_gpu_takes_its_share_of_text_and_batch():
    settings = make_settings({**TEXT, "batch_tokens": 2**14})
    one, four = (make_plan(settings, SMALL, DEVICES["a100"], gpus=n) for n in (1, 4))
    assert one.several is None
    assert one.epoch.all_reduces == 0
    assert four.base_pass.flops == pytest.approx(one.base_pass.flops / 4)
    assert four.epoch.flops == pytest.approx(one.epoch.flops / 4, rel=1e-3)
    assert four.memory.micro_batch_tokens == 2**12
    assert four.epoch.launches == pytest.approx(one.epoch.launches, rel=0.5)  # as many steps, of a quarter each
    assert four.epoch.bytes > one.epoch.bytes / 4  # every GPU makes the optimizer's whole step
    assert four.memory.worst.peak < one.memory.worst.peak
    assert four.several.steps == -(-hard_count(settings.hard_ratio, 2**22) // 2**14)


def test_all_reduces_of_adapters_and_of_full_stages():
    base, settings = base_configuration("llama-3-8b"), {**TEXT, "preset": "lora", "batch_tokens": 4096}
    plans = [
        make_plan(make_settings({**settings, "adapter": name}), base, DEVICES["h100"], gpus=8)
        for name in ("lora", "none")
    ]
    adapters, full = (plan.several for plan in plans)
    assert adapters.gradient_bytes == 4 * TRAINED
    assert adapters.all_reduce_bytes == 2 * 7 / 8 * 4 * TRAINED
    assert adapters.all_reduce_seconds == pytest.approx(adapters.all_reduce_bytes / (0.7 * 450e9))
    assert adapters.stage_bytes == 16 * TRAINED
    assert adapters.fits_one
    parameters = Shape.from_settings(plans[1].settings, base).counts.parameters()
    assert full.gradient_bytes == 4 * parameters  # what several GPUs add up is float32
    assert full.gradient_bytes > 80 * adapters.gradient_bytes
    assert not full.fits_one
    assert full.sharded_bytes == full.stage_bytes / 8 > 10 * GIB
    assert not plans[1].fits
    sharded = make_plan(make_settings({**settings, "adapter": "none", "shard": "fsdp"}), base, DEVICES["h100"], gpus=8)
    assert sharded.fits


def test_beyond_one_machine_the_slower_of_link_and_network_counts():
    t4 = DEVICES["t4"]
    assert t4.link(8) == pytest.approx(0.7 * 16e9)
    assert t4.link(9) == pytest.approx(0.7 * 12.5e9)
    plan = make_plan(make_settings({**TEXT, "batch_tokens": 512}), SMALL, t4, gpus=64)
    assert plan.epoch.limit == "all-reduces"  # full stages, eight tokens a GPU and step
    assert plan.epoch.seconds == plan.several.steps * plan.several.all_reduce_seconds


def test_the_command(capsys):
    flags = ["--base", "llama-3-8b", "--device", "h100", "--preset", "lora", "--batch-tokens", "4096", "--gpus", "8"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    for word in ("8 x H100 SXM 80GB", "512 on each GPU", "all-reduce: 0.16 GiB", "315.0 GB/s between GPUs", "room for"):
        assert word in said
    assert main([*flags, "--adapter", "none", "--link-gbs", "50"]) == 1
    said = capsys.readouterr().out
    assert "--shard fsdp, with which each holds" in said
    assert "35.0 GB/s between GPUs" in said
    assert main([*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["gpus"], told["gradient_bytes"], told["stage_fits_one_gpu"]) == (8, 4 * TRAINED, True)
    assert told["read_bytes"] == pytest.approx(320 * 128 * (4096 * 2 + 24) / 8)
