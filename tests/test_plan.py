"""The memory plan: counts equal to the real modules', bytes as measured, the command line."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama_config
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.plan import main
from cascade_fast.planning.base_configs import BUILT_IN, base_configuration
from cascade_fast.planning.counts import Shape, base_weight_bytes, optimizer_bytes, saved_activation_bytes
from cascade_fast.planning.devices import DEVICES, find_device
from cascade_fast.planning.kv import choose_kv
from cascade_fast.planning.memory import (
    CONTEXT_BYTES,
    GIB,
    largest_batch_tokens,
    memory_plan,
    micro_batch_tokens,
)
from cascade_fast.planning.times import base_pass_time, epoch_time
from cascade_fast.settings import make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage
from cascade_fast.stages.stage import StageConfig

SIZES = dict(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
BASES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied-biased": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**{**SIZES, "head_dim": 16}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False),
}
WARM, SEED = make_settings({}), make_settings({"preset": "seed"})
LOOK = make_settings({"stage_kind": "second-look"})
SMALL = base_configuration("smollm2-135m")


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_base_s_parameters_are_counted_as_transformers_makes_them(base):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    assert Shape.from_settings(WARM, base).base_parameters() == sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert Shape.from_settings(WARM, base).base_quantized() == sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("config", [WARM, SEED], ids=["warm", "seed"])
def test_a_stage_s_parameters_are_counted_as_the_stage_has_them(base, config):
    shape = Shape.from_settings(config, base)
    with torch.device("meta"):
        stage = AppendedStage(shape.stage, head_VD=torch.empty(200, 64))
    unused = {id(p) for p in stage.decayed_only()}
    assert shape.counts.parameters() == stage.parameter_count()
    assert shape.counts.trained() == sum(p.numel() for p in stage.parameters() if id(p) not in unused)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama-3-8b", 8_030_261_248),
    ],
)
def test_built_in_bases_have_their_published_sizes(name, parameters):
    assert Shape.from_settings(WARM, base_configuration(name)).base_parameters() == parameters


def test_the_seed_s_stage_is_the_one_of_the_original_experiment():
    assert Shape.from_settings(SEED, SMALL).counts.parameters() == 56_632_896


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_second_look_s_parameters_are_counted_as_it_has_them(base):
    shape = Shape.from_settings(LOOK, base)
    with torch.device("meta"):
        stage = SecondLookStage(SecondLookConfig.from_base(base, layers=8), head_VD=torch.empty(200, 64))
    assert shape.counts.parameters() == shape.counts.trained() == stage.parameter_count()


def test_the_plan_of_a_second_look():
    """Its keys and values are on disk as the store has them, or nowhere; then a frozen copy makes them."""
    store, recompute = (
        memory_plan(
            dataclasses.replace(LOOK, kv=kv, num_stages=1), SMALL, dtype=torch.bfloat16, on_cpu=True, process_bytes=0
        )
        for kv in ("store", "recompute")
    )
    blocks = 320 + 2 * 64  # the defaults
    kv_bytes = blocks * 128 * 8 * 2 * 3 * 64 * 2
    key = "base pass (hidden stores, head)"
    assert store.disk[key] - recompute.disk[key] == kv_bytes
    assert store.phases[1].mapped["hidden stores"] - recompute.phases[1].mapped["hidden stores"] == kv_bytes
    assert "frozen copy of the layers (float32)" in recompute.phases[1].lasting
    appended = memory_plan(WARM, SMALL, dtype=torch.bfloat16, on_cpu=True, process_bytes=0)
    assert store.phases[1].passing["activations"] > appended.phases[1].passing["activations"]


def test_kv_is_stored_where_that_is_cheaper_and_fits():
    seconds = {"store": 1.0, "recompute": 5.0}
    assert choose_kv(seconds, 100.0, 1000.0)[0] == "store"
    chosen, why = choose_kv(seconds, 100.0, 50.0)
    assert chosen == "recompute"
    assert "GiB are free" in why
    assert choose_kv({"store": 5.0, "recompute": 1.0}, 100.0, 1000.0)[0] == "recompute"


def test_the_command_knows_second_looks(capsys):
    assert main(["--stage-kind", "second-look", "--device", "t4"]) == 0
    said = capsys.readouterr().out
    assert "28,321,344 parameters of its own" in said
    assert "kv: " in said
    flops = [Shape.from_settings(config, SMALL).counts.training_flops(128) for config in (WARM, LOOK)]
    assert flops[1] - flops[0] == 8 * (6 * 576 * (576 + 192) + 12 * 128 * 576)


def test_optimizer_bytes():
    shape = Shape.from_settings(WARM, SMALL)
    trained, norms = shape.counts.trained(), (2 * 8 + 1) * 576
    assert optimizer_bytes(shape, "adamw") == 8 * trained
    assert optimizer_bytes(shape, "adamw8bit") == 8 * norms + (trained - norms) * (2 + 8 / 256)


def test_weight_bytes_in_4_bit():
    shape = Shape.from_settings(WARM, SMALL)
    rest = shape.base_parameters() - shape.base_quantized()
    assert base_weight_bytes(shape, "none", 2) == 2 * 134_515_008
    assert base_weight_bytes(shape, "nf4", 2) == shape.base_quantized() * 0.5625 + 2 * rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_autograd_saves(dtype):
    """Bytes of the saved tensors with one row a token, of a layer: the difference of two stages and one layer."""
    base, tokens = BASES["llama"], 100

    def saved(layers: int) -> int:
        shape = StageConfig.from_base(base, layers=layers, init="identity", head="shared", reads="residual")
        stage = AppendedStage(shape, head_VD=torch.zeros(200, 64))
        storages: dict[int, torch.Tensor] = {}

        def pack(tensor):
            if tensor.shape[:1] == (tokens,):
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            output = stage(torch.randn(tokens, 64))
        del output
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    assert saved(3) - saved(2) == tokens * saved_activation_bytes(Shape.from_settings(WARM, base), dtype.itemsize)


def test_the_peak_is_the_largest_phase_and_logits_are_a_chunk_whatever_the_batch():
    def plan(**settings):
        settings = make_settings({"store": "device", **settings})
        return memory_plan(settings, SMALL, dtype=torch.float16, on_cpu=False)

    small, large = plan(batch_tokens=512), plan(batch_tokens=2**14)
    assert small.worst.peak == max(phase.peak for phase in small.phases)
    per_token = 8 * saved_activation_bytes(Shape.from_settings(WARM, SMALL), 2, on_cpu=False) + 16 * 576
    grown = large.phases[1].peak - small.phases[1].peak
    assert grown == (2**14 - 512) * per_token


def test_a_gpu_shares_memory_between_activations_and_gradients_and_the_cpu_adds_them_up():
    gpu = memory_plan(WARM, SMALL, dtype=torch.bfloat16, on_cpu=False).phases[1]
    cpu = memory_plan(WARM, SMALL, dtype=torch.bfloat16, on_cpu=True, process_bytes=0).phases[1]
    assert gpu.needed == sum(gpu.lasting.values()) + max(gpu.passing.values())
    assert cpu.needed == sum(cpu.lasting.values()) + sum(cpu.passing.values())
    assert cpu.peak - cpu.needed == sum(cpu.mapped.values()) > 0


def test_micro_batch_is_the_largest_equal_part_that_fits():
    settings = make_settings({"batch_tokens": 2**16, "num_stages": 1})

    def needed(micro: int) -> float:
        fixed = make_settings({"batch_tokens": 2**16, "num_stages": 1, "micro_batch_tokens": micro})
        plan = memory_plan(fixed, SMALL, dtype=torch.float16, on_cpu=False)
        return plan.phases[1].needed + CONTEXT_BYTES

    for memory in (2 * GIB, 4 * GIB, 64 * GIB):
        micro = micro_batch_tokens(settings, SMALL, memory, dtype=torch.float16)
        parts = -(-(2**16) // micro)
        assert micro == -(-(2**16) // parts)
        assert needed(micro) <= memory
        assert parts == 1 or needed(-(-(2**16) // (parts - 1))) > memory
    bound = make_settings({"batch_tokens": 512, "micro_batch_tokens": 100})
    assert micro_batch_tokens(bound, SMALL, 64 * GIB, dtype=torch.float16) == 86  # ceil(512 / 6)
    assert micro_batch_tokens(settings, SMALL, 1, dtype=torch.float16) == 2**16  # nothing fits: parts do not help


def test_the_largest_batch_fits_and_one_token_more_does_not():
    memory = 3 * GIB
    batch = largest_batch_tokens(WARM, SMALL, memory, dtype=torch.float16, on_cpu=False)
    for tokens, fits in ((batch, True), (batch + 1, False)):
        settings = make_settings({"batch_tokens": tokens, "micro_batch_tokens": tokens})
        phase = memory_plan(settings, SMALL, dtype=torch.float16, on_cpu=False).phases[1]
        assert (phase.needed + CONTEXT_BYTES <= memory) is fits


def test_micro_batch_tokens_below_one_is_refused():
    with pytest.raises(InputError, match="micro_batch_tokens: 0; must be at least 1"):
        make_settings({"micro_batch_tokens": 0})


def test_the_roofline_names_its_limit():
    t4 = find_device("t4", "float32")
    one_token = make_settings({"preset": "seed"})
    time = epoch_time(one_token, SMALL, t4, 32)
    assert time.seconds == max(time.flops, time.bytes, time.launches)
    large = make_settings({"batch_tokens": 2**14, "train_blocks": 4000})
    assert base_pass_time(large, base_configuration("llama-3-8b"), DEVICES["t4"]).limit == "FLOPs"
    steps = -(-115_200 // 32)
    assert time.bytes > steps * 28 * 56e6 * 0.8 / t4.bytes_per_second  # AdamW alone moves 28 bytes a parameter


def test_the_command_says_whether_it_fits(capsys):
    assert main(["--base", "smollm2-1.7b", "--device", "t4", "--num-stages", "1"]) == 0
    said = capsys.readouterr().out
    for word in ("1,711,376,384 parameters", "optimizer state (adamw)", ": fits", "limited by", "40% of peak"):
        assert word in said
    assert main(["--base", "llama-3-8b", "--device", "t4"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_the_command_reads_a_folder_s_config_and_prints_json(tmp_path, capsys):
    tiny_llama_config().save_pretrained(tmp_path)
    arguments = ["--base", str(tmp_path), "--device", "cpu", "--tflops", "1", "--gbs", "10", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert told["peak_bytes"] == max(told["phases"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--base", "no/such-model"],
            "base: 'no/such-model'; must be a folder with a config.json",
        ),
        (["--device", "abacus"], "device: 'abacus'"),
        (["--device", "t4", "--gbs", "-1"], "gbs: -1.0; must be above 0"),
        (["--device", "t4", "--gbs", "inf"], "gbs: inf; must be above 0, and finite"),
        (["--memory-gib", "24"], "tflops, gbs: not given; without a device, a GPU needs memory_gib, tflops and gbs"),
        (["--gbs", "900", "--memory-gib", "24"], "tflops: not given; without a device"),
        (["--ram-gib", "0"], "ram_gib: 0.0; must be above 0"),
        (["--link-gbs", "0"], "link_gbs: 0.0; must be above 0"),
        (["--gpus", "0"], "gpus: 0; must be at least 1"),
        (["--gpus", "2", "--device", "cpu", "--tflops", "1", "--gbs", "1"], "gpus: 2; must be 1 with device cpu"),
    ],
)
def test_mistakes_are_named(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_run_says_its_plan_first_and_records_planned_and_measured(tiny_settings, tmp_path, capsys):
    run = run_cascade(make_settings({**tiny_settings, "out": str(tmp_path / "run"), "num_stages": 1}))
    memory = json.loads((run.path / "results.json").read_text())["memory"]
    assert memory["planned"]["peak_bytes"] == max(memory["planned"]["phases"].values())
    assert memory["measured_peak_bytes"] > 0
    said = capsys.readouterr().out
    assert said.index("plan: peak") < said.index("base pass: ") < said.index("(planned ")


def test_a_run_is_planned_once(tiny_settings, tmp_path, monkeypatch):
    """When its folder is opened, for the disk and all that follows; not at all where it is finished."""
    plans = []

    def counted(*args, **settings):
        plans.append(memory_plan(*args, **settings))
        return plans[-1]

    monkeypatch.setattr("cascade_fast.planning.plan.memory_plan", counted)
    settings = make_settings({**tiny_settings, "out": str(tmp_path / "run"), "num_stages": 1, "resume": "auto"})
    run = run_cascade(settings)
    assert len(plans) == 1
    results = json.loads((run.path / "results.json").read_text())
    assert results["memory"]["planned"] == plans[0].to_dict()
    run_cascade(settings)
    assert len(plans) == 1


def test_every_built_in_base_can_be_planned_on_every_device():
    for base in BUILT_IN:
        for device in DEVICES.values():
            plan = memory_plan(WARM, base_configuration(base), dtype=device.dtype, on_cpu=False)
            assert 0 < plan.needed <= plan.worst.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m",
        "llama-360m",
        "llama-1b",
        "smollm2-135m, second look",
        "smollm2-135m, preset second-look",
    ],
)
def test_the_planned_peak_is_within_15_percent_of_the_measured_one(name, tmp_path):
    path = Path(__file__).parent.parent / "benchmarks" / "plan_error.py"
    spec = importlib.util.spec_from_file_location("plan_error", path)
    plan_error = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan_error)
    assert abs(plan_error.measure_one(name, tmp_path)) <= 0.15


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc keeps freed memory; others do as they like")
def test_trimming_gives_freed_pages_back():
    """In a process of its own, told to keep what it frees: 256 MiB of freed blocks below one that lives."""
    script = """
import torch
from cascade_fast.runtime.compute import keep_freed_memory, trim_host_memory
from cascade_fast.runtime.compute import resident_bytes
assert keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(257)]
lives = blocks.pop()
del blocks
before = resident_bytes()
trim_host_memory()
print(before - resident_bytes(), float(lives.sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, alive = done.stdout.split()
    assert int(given_back) > 200 * 2**20
    assert float(alive) == 2**18
