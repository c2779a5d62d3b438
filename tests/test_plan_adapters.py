"""Plan and ledger of second looks with adapters: counted as the real modules have it, and what r = 1 saves."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_llama_config
from second_look_cases import LAYERS, lent_stage, passed_by_base
from test_plan import BASES, SMALL
from test_quantization import needs_bitsandbytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cascade_fast.losses import linear_cross_entropy
from cascade_fast.plan import main
from cascade_fast.planning.base_configs import base_configuration
from cascade_fast.planning.counts import (
    EIGHT_BIT_MINIMUM,
    Shape,
    kept_layer_bytes,
    optimizer_bytes,
    saved_activation_bytes,
)
from cascade_fast.planning.devices import DEVICES
from cascade_fast.planning.ledger import compute_ledger
from cascade_fast.planning.memory import GIB, memory_plan
from cascade_fast.planning.plan import make_plan
from cascade_fast.planning.times import base_flops, base_pass_time, epoch_time
from cascade_fast.records import SplitTokens
from cascade_fast.runtime.compute import PADDED_TO
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage
from cascade_fast.stages.tokens import SequencePack, SequenceTokens

LOOK = {"stage_kind": "second-look"}
ADAPTER = {**LOOK, "adapter": "lora"}
SUBSET = ["down_proj", "q_proj"]
COMMAND = ["--base", "llama-3-8b", "--device", "t4", "--base-quantization", "nf4", "--adapter", "lora"]
COMMAND += ["--stage-kind", "second-look", "--layers-per-stage", "32"]


@pytest.mark.parametrize("targets", [[], SUBSET], ids=["all", "two"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_an_adapter_s_parameters_are_counted_as_it_has_them(base, targets):
    settings = make_settings({**ADAPTER, "lora_rank": 3, "lora_targets": targets, "layers_per_stage": 2})
    shape = Shape.from_settings(settings, base)
    with torch.device("meta"):
        stage = SecondLookStage(shape.stage, head_VD=torch.empty(200, 64))
        full = SecondLookStage(SecondLookConfig.from_base(base, layers=2), head_VD=torch.empty(200, 64))
    counts = shape.counts
    assert counts.parameters() == counts.trained() == counts.trained_matrices() == stage.parameter_count()
    assert counts.frozen() == full.parameter_count()
    of_linear = sum(m.weight.numel() for m in full.modules() if isinstance(m, nn.Linear))
    assert counts.matrices() == of_linear + stage.parameter_count()
    assert counts.largest_trained() == max(p.numel() for p in stage.parameters())
    assert kept_layer_bytes(shape, "none", 2) == 2 * full.parameter_count()


@pytest.mark.parametrize("rank", [2, 16, 200])
def test_of_its_8_bit_moments_small_ones_stay_in_float32(rank):
    settings = make_settings({**ADAPTER, "lora_rank": rank, "layers_per_stage": 2, "optimizer": "adamw8bit"})
    shape = Shape.from_settings(settings, SMALL)
    with torch.device("meta"):
        sizes = [p.numel() for p in SecondLookStage(shape.stage, head_VD=None).parameters()]
    expected = sum(8 * n if n < EIGHT_BIT_MINIMUM else n * (2 + 8 / 256) for n in sizes)
    assert optimizer_bytes(shape, "adamw8bit") == pytest.approx(expected)
    assert optimizer_bytes(shape, "adamw") == 8 * sum(sizes)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_eight_billion_parameters_fit_in_ten_gib(capsys):
    assert main([*COMMAND, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peak_bytes"] / GIB == pytest.approx(9.47, abs=0.01)
    assert told["fits"]
    assert main(COMMAND) == 0
    assert "a stage: 32 layers, 41,943,040 parameters of its own" in capsys.readouterr().out


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_base_s_layers_are_there_once(on_cpu, quantization):
    """In every phase after the base pass, whatever uses them; and only adapters are trained and saved."""
    plans = {}
    for kv in ("store", "recompute"):
        settings = make_settings({**ADAPTER, "kv": kv, "base_quantization": quantization})
        plans[kv] = memory_plan(settings, SMALL, dtype=torch.bfloat16, on_cpu=on_cpu, process_bytes=0)
    counts, size = Shape.from_settings(settings, SMALL).counts, kept_layer_bytes
    layers = size(Shape.from_settings(settings, SMALL), quantization, 2)
    assert layers == pytest.approx(counts.frozen() * (0.5625 if quantization == "nf4" else 2), rel=2e-3)
    for plan in plans.values():
        for phase in plan.phases[1:]:
            held, other = (phase.mapped, phase.lasting) if on_cpu else (phase.lasting, phase.mapped)
            copied = quantization == "none"  # with room for the updates, which takes the layers' place on a GPU
            room = 2 * 2 * counts.trained() if copied else 0
            assert held["the base's layers"] == layers + (0 if on_cpu else room)
            assert "the base's layers" not in other
            assert phase.lasting.get("a copy of them, with the updates", 0) == (
                layers + room if on_cpu and copied else 0
            )
            assert not any("frozen copy" in name for name in phase.lasting)
        training, updates = plan.phases[1], 4 * counts.trained()
        assert training.lasting["stage weights (float32)"] == updates
        assert (training.lasting if on_cpu else training.passing)["gradients"] == updates
        assert plan.disk["stages"] == 2 * updates
        assert plan.disk["checkpoints, best weights"] == 3 * 4 * updates
        head_and_layers = (
            plan.disk["base pass (hidden stores, head)"] - plans["recompute"].disk["base pass (hidden stores, head)"]
        )
        assert head_and_layers in (0, 448 * 128 * counts.config.layers * 2 * 3 * 64 * 2)  # keys and values


def test_the_same_stage_without_an_adapter_takes_more():
    plans = {
        name: memory_plan(
            make_settings({**settings, "kv": "store"}), SMALL, dtype=torch.float16, on_cpu=False, memory_bytes=None
        )
        for name, settings in (("adapter", ADAPTER), ("copy", LOOK))
    }
    assert plans["adapter"].phases[1].peak < 0.8 * plans["copy"].phases[1].peak
    assert plans["adapter"].disk["stages"] < 0.06 * plans["copy"].disk["stages"]


TOKENS = 5 * PADDED_TO  # no rows of padding then; and no other size of these models


def _saved(layers: int, quantization: str, dtype: torch.dtype, targets: list[str]) -> int:
    """Bytes of the tensors with one row a token that autograd keeps."""
    tokens = TOKENS
    shape = SecondLookConfig.from_base(
        BASES["llama"], layers=layers, lora={"rank": 4, "alpha": 8.0, "targets": targets}
    )
    stage = lent_stage(shape, quantization=quantization, dtype=dtype)
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.shape[:1] == (tokens,):
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    row_K = torch.arange(tokens)
    inputs = SequencePack(torch.randn(tokens, 64), row_K, row_K, row_K, tokens, None, (1, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        output = stage(inputs)
    del output
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_activations_are_what_autograd_saves(quantization, dtype):
    settings = make_settings({**ADAPTER, "base_quantization": quantization, "lora_rank": 4})
    for targets in (list(LORA_TARGETS), SUBSET):
        saved = _saved(3, quantization, dtype, targets) - _saved(2, quantization, dtype, targets)
        settings = dataclasses.replace(settings, lora_targets=tuple(targets))
        shape = Shape.from_settings(settings, BASES["llama"])
        memory = shape.memory(settings, dtype.itemsize)
        planned = TOKENS * (saved_activation_bytes(shape, dtype.itemsize) + memory.saved_of_updates())
        # In 4 bit a layer without an update keeps nothing of its inputs.
        assert saved == planned if len(targets) == 7 or quantization == "none" else 0.7 * planned < saved < planned


@needs_bitsandbytes
def test_in_4_bit_the_kept_layers_are_as_large_as_planned(look_settings, nf4_base, tmp_path):
    settings = {**look_settings, "base": str(nf4_base), "adapter": "lora", "base_quantization": "nf4"}
    base, _, passed = passed_by_base(settings, tmp_path)
    real = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in {**passed.layers, "norm": passed.norm_D}.items()
        if "quant_map" not in name and "quant_state" not in name  # of each layer, a few hundred bytes
    )
    planned = kept_layer_bytes(Shape.from_settings(make_settings(settings), base.config), "nf4", 4)
    # On a CPU with AVX512-BF16 bitsandbytes keeps scales in 16 bit.
    assert 0.94 * planned < real <= planned


# --- FLOPs and times --------------------------------------------------------------------------------------------------


def test_flops_of_a_step_are_those_counted(look_settings, tmp_path, monkeypatch):
    """With that of what the first layer reads, which comes along with the updates'."""
    monkeypatch.setenv("CASCADE_FAST_BACKEND", "reference")  # torch's counter sees torch's products only
    base, _, passed = passed_by_base({**look_settings, "adapter": "lora", "hard_ratio": 1.0}, tmp_path)
    settings = make_settings({**look_settings, "adapter": "lora", "hard_ratio": 1.0})
    shape = Shape.from_settings(settings, base.config)
    stage = shape.kind.new(settings, base.config, passed, None, 1)
    tokens = SequenceTokens([passed.stores["train"]], torch.arange(64))
    pack, label_K = tokens.batch(torch.arange(2), torch.device("cpu"))
    in_place = {torch.ops.aten.addmm_: lambda _out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's counter has none
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        linear_cross_entropy(stage(pack)[1], stage.head, label_K).backward()
    # Planned are 4 for a frozen weight and 6 for an update. Beside an update stand zeros for those of other layers with
    # the same inputs, which are multiplied too.
    sizes, rank = shape.counts.linear_sizes(), settings.lora_rank
    others = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "gate_proj": 1, "up_proj": 1}
    zeros = sum(4 * sizes[name][1] * rank * count for name, count in others.items())
    planned = shape.counts.training_flops(32) + settings.layers_per_stage * zeros
    assert counter.get_total_flops() == 64 * planned


def test_frozen_weights_cost_four_and_updates_six():
    full, adapter = (Shape.from_settings(make_settings(s), SMALL).counts for s in (LOOK, ADAPTER))
    assert adapter.training_flops(128) == full.training_flops(128) - 2 * full.matrices() + 6 * adapter.trained()


def test_where_every_token_enters_the_base_reads_training_text_up_to_the_stage():
    settings = make_settings({**ADAPTER, "hard_ratio": 1.0, "layers_per_stage": 20, "test_tokens": 0})
    train, val = settings.expected_tokens("train"), settings.expected_tokens("val")
    whole, head = (base_flops(Shape.from_settings(settings, SMALL), 128, with_logits=b) for b in (False, True))
    for share, expected in ((1.0, train * whole / 3 + val * head), (0.9, (train + val) * head)):
        device = dataclasses.replace(DEVICES["t4"], flops_fraction=1.0)
        taken = base_pass_time(settings, SMALL, device, share)
        assert taken.flops == pytest.approx(expected / device.rate)
    every = train + val
    for labelled, layer_tokens in ((train, every * 30 - train * 20), (train - 1, every * 30)):
        tokens = SplitTokens(train=labelled, val=val, test=0)
        ledger = compute_ledger(settings, SMALL, tokens=tokens, base_pass_seconds=1.0, stages=[], rate=1e12)
        assert ledger.base_pass.layer_tokens == layer_tokens
        assert ledger.base_pass.tokens == every
    assert ledger.base_pass.flops == pytest.approx(every * whole + (every - 1) * (head - whole))


def test_where_every_token_enters_nobody_needs_keys_and_values():
    """Unless some token has no label: it enters no stage, and others attend to it."""
    settings = make_settings({**ADAPTER, "hard_ratio": 1.0, "num_stages": 1})
    device, base = DEVICES["t4"], base_configuration("smollm2-360m")
    every, context = (make_plan(settings, base, device, labelled_share=share) for share in (1.0, 0.9))
    assert every.kv_line is None
    assert context.kv_line is not None
    assert every.epoch.flops < epoch_time(dataclasses.replace(settings, kv="recompute"), base, device, 512, 0.99).flops
    for kv in ("store", "recompute", "auto"):
        asked = dataclasses.replace(settings, kv=kv, store="device")
        how = {"dtype": torch.float16, "on_cpu": False, "fused_attention": False}
        plan, with_context = (memory_plan(asked, base, **how, labelled_share=share) for share in (1.0, 0.9))
        assert plan.to_dict() == every.memory.to_dict()
        assert with_context.phases[1].needed > plan.phases[1].needed
        assert ("keys and values" in with_context.phases[0].passing) is (kv != "recompute")
        assert "keys and values" not in plan.phases[0].passing
        key = "base pass (hidden stores, head)"
        assert (with_context.disk[key] > plan.disk[key]) is (kv != "recompute")


def test_a_shorter_base_pass_is_for_second_looks():
    settings = make_settings({"hard_ratio": 1.0})
    shape = Shape.from_settings(settings, tiny_llama_config())
    assert not shape.needs.all_enter
    assert shape.base_layer_tokens(100, 80) == 300
    look = Shape.from_settings(make_settings({**LOOK, "hard_ratio": 1.0, "layers_per_stage": 2}), tiny_llama_config())
    assert look.base_layer_tokens(100, 80) == 300 - 80 * LAYERS
