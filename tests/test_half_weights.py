"""AdamW with 16-bit copies of weights: the operators against the truth, the optimizer against torch's, and trainings
whose layers multiply with the copies."""

import copy

import op_cases as cases
import pytest
import torch
from cuda_cases import needs_pretend_gpu, on_pretend_card
from torch.library import opcheck

from cascade_fast import ops
from cascade_fast.settings import RunSettings
from cascade_fast.training.adamw import AdamW
from cascade_fast.training.half_weights import HalfWeights
from cascade_fast.training.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors

SHAPES = [(1,), (3, 0, 5), (37, 41), (129,), ()]
HALVES = (torch.float16, torch.bfloat16)


# --- operators --------------------------------------------------------------------------------------------------------


def in_float64(args, scale, lr, beta1, beta2, eps, weight_decay):
    params, grads, exp_avgs, exp_avg_sqs, steps, _ = ([t.double() for t in column] for column in args)
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        m += (g / scale - m) * (1 - beta1)
        v += ((g / scale) ** 2 - v) * (1 - beta2)
        p *= 1 - lr * weight_decay
        p -= lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps)
    return params, exp_avgs, exp_avg_sqs, steps


@pytest.mark.parametrize("step", [0.0, 5000.0])
def test_a_step_against_the_truth(step):
    args = cases.adamw_arguments(SHAPES, (torch.float32, *HALVES), (None, *HALVES), step)
    grads = copy.deepcopy(args[1])
    truth = in_float64(args, 32.0, **cases.ADAMW_SETTINGS)
    ops.adamw_(*args, **cases.ADAMW_SETTINGS, grad_scale=torch.tensor(32.0), found_inf=torch.tensor(0.0))
    for place, wanted in zip((0, 2, 3, 4), truth, strict=True):
        for ours, true in zip(args[place], wanted, strict=True):
            torch.testing.assert_close(ours, true.float(), atol=1e-9, rtol=2e-6)
    assert all(map(torch.equal, args[1], grads))
    for param, made in zip(args[0], args[5], strict=True):
        assert made.numel() == 0 or torch.equal(made, param.to(made.dtype))


def test_a_step_that_is_left_out_changes_nothing():
    args = cases.adamw_arguments(SHAPES, HALVES, HALVES)
    args[1][2][5] = torch.nan
    norm, _, found_inf = ops.grad_norm(args[1], torch.tensor(2.0), 1.0)
    assert norm.isnan()
    before = copy.deepcopy(args)
    ops.adamw_(*args, **cases.ADAMW_SETTINGS, found_inf=found_inf)
    for place in (0, 2, 3, 4):
        assert all(map(torch.equal, args[place], before[place]))


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_the_norm_and_its_factors_against_the_truth(scale, clip):
    """Float16 gradients whose squares overflow float16."""
    grads = [g * 600 for g in cases.adamw_arguments(SHAPES, (torch.float16, torch.float32))[1]]
    true = torch.cat([g.double().flatten() for g in grads]).norm().item()
    number = None if scale is None else torch.tensor(scale)
    norm, factor, found_inf = ops.grad_norm(grads, number, clip)
    used = scale or 1.0
    wanted = max(used, (true + 1e-6 * used) / clip) if clip else used
    assert [norm.item(), factor.item()] == pytest.approx([true, wanted], rel=1e-6)
    assert found_inf == 0


def test_opcheck():
    args = cases.adamw_arguments([(5, 7), (0,), (3,)], (torch.float16, torch.float32), (torch.float16, None))
    opcheck(torch.ops.cascade_fast.adamw_.default, args, {**cases.ADAMW_SETTINGS, "found_inf": torch.tensor(0.0)})
    opcheck(torch.ops.cascade_fast.grad_norm.default, (args[1], torch.tensor(2.0), 1.0))


@pytest.mark.parametrize(
    ("place", "bad", "said"),
    [
        (0, torch.zeros(5, 7).half(), r"params\[0\]: \(5, 7\) float16 on cpu.*must be contiguous float32"),
        (1, torch.zeros(7, 5), r"grads\[0\]: \(7, 5\) float32 on cpu; must have shape \(5, 7\)"),
        (3, torch.zeros(7, 5).t(), r"exp_avg_sqs\[0\]: .*strides \(1, 5\); must be contiguous"),
        (4, torch.zeros(1), r"steps\[0\]: \(1,\) float32 on cpu; must be one float32 number"),
        (5, torch.zeros(5, 7), r"copies\[0\]: \(5, 7\) float32 on cpu.*must be empty, or contiguous float16"),
    ],
)
def test_what_does_not_fit_is_named(place, bad, said):
    args = cases.adamw_arguments([(5, 7)])
    args[place][0] = bad
    with pytest.raises(ValueError, match=said):
        ops.adamw_(*args, **cases.ADAMW_SETTINGS)


def test_no_gradients_and_a_negative_clip_are_named():
    with pytest.raises(ValueError, match="grads: none"):
        ops.grad_norm([], None, 1.0)
    with pytest.raises(ValueError, match="clip: -1"):
        ops.grad_norm([torch.ones(2)], None, -1.0)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 3, bias=False))


def trained(module, optimizer, steps, halves=None):
    """``steps`` in bfloat16 under autocast, the second of them left out."""
    x = torch.randn(16, 9, generator=torch.Generator().manual_seed(1))
    for step in steps:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step == 1))
        with torch.autocast("cpu", torch.bfloat16):
            if halves is None:
                out = module(x + step)
            else:
                with halves.in_use():
                    out = module(x + step)
        (8.0 * out.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def with_halves(module, optimizer, **changes):
    options = {"dtype": torch.bfloat16, "one_pass": True, **changes}
    linears = [m for m in module if isinstance(m, torch.nn.Linear)]
    return HalfWeights(linears, list(module.parameters()), optimizer, options["dtype"], one_pass=options["one_pass"])


def test_training_with_copies_is_training_with_casts_bit_for_bit_and_its_state_is_torch_s():
    """Through a checkpoint of torch's optimizer, which goes on in ours, and back."""
    settings = RunSettings(optimizer="adamw", lr=1e-2)
    plain, ours = layers(), layers()
    theirs = build_optimizer(plain.parameters(), settings, torch.device("cpu"))
    optimizer = AdamW(ours.parameters(), lr=1e-2, weight_decay=settings.weight_decay)
    halves = with_halves(ours, optimizer)
    assert len(halves.copies) == 3  # two weights and a bias
    for part in (range(4), range(4, 6)):
        trained(plain, theirs, part)
        trained(ours, optimizer, part, halves)
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            assert torch.equal(p, q)
        assert all(torch.equal(copied, p.bfloat16()) for p, copied in halves.copies.items())
        made, wanted = optimizer_tensors(optimizer), optimizer_tensors(theirs)
        assert made[0].keys() == wanted[0].keys()
        assert all(torch.equal(made[0][name], wanted[0][name]) for name in wanted[0])
        assert made[1] == wanted[1]
        load_optimizer_tensors(optimizer, *copy.deepcopy(wanted))
        load_optimizer_tensors(theirs, *copy.deepcopy(made))
    assert all(p.dtype == torch.float32 and p.grad is None for p in ours.parameters())
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_there_are_no_copies_where_they_would_lose_something():
    module = layers()
    optimizer = AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    assert with_halves(module, optimizer, one_pass=False).copies == {}
    assert with_halves(module, optimizer, dtype=torch.float32).copies == {}
    assert with_halves(module, torch.optim.AdamW(module.parameters(), fused=True)).copies == {}
    trained_weight = [module[0].weight]
    assert (
        list(HalfWeights([module[0]], trained_weight, optimizer, torch.float16, one_pass=True).copies) == trained_weight
    )


def test_a_rate_may_be_a_tensor():
    plain, ours = layers(), layers()
    optimizers = [AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (plain, ours)]
    for group in optimizers[1].param_groups:
        group["lr"] = torch.tensor(1e-2)
    for module, optimizer in zip((plain, ours), optimizers, strict=True):
        trained(module, optimizer, range(2))
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --- on a pretend card ------------------------------------------------------------------------------------------------

PROGRAM = """
import json, shutil, tempfile
from pathlib import Path
import pretend_gpu, torch
from test_launches import SHAPE, as_on_a_card

pretend_gpu.install(card="t4", poison=True, late_copies=True)
as_on_a_card()
from benchmarks import workload
from transformers import LlamaConfig
from cascade_fast.planning.counts import Shape
from cascade_fast.training import trainer as module

workload.SEQ_LEN = 32
CONFIG = LlamaConfig(num_hidden_layers=2, **SHAPE)

def trainer(preset, folder, **changes):
    Path(folder).mkdir(exist_ok=True)
    changes = {"layers_per_stage": 2, "batch_tokens": 24, "epochs": 2, "store": "device", "lr": 1e-3, **changes}
    return workload.preset_trainer(preset, Path(folder), "cuda", CONFIG, 4, **changes)

def weights(one):
    return torch.cat([p.detach().flatten().cpu() for p in one.module.parameters()])

def run(preset, **changes):
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(preset, folder, **changes)
        copies, start = len(one.halves.copies), weights(one)
        history = one.run()
        return one, {"copies": copies, "losses": [e.train_loss for e in history.epochs], "moved": weights(one) - start}

def resumed(preset):
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(preset, folder)
        first.log_event = lambda event, **_: first.signals.append(15) if event == "epoch" else None
        first.signals = []
        first.module.train()
        try:
            first.run_epochs()
        except module.Interrupted:
            pass
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, other, ignore=shutil.ignore_patterns("store"), dirs_exist_ok=True)
            again = trainer(preset, other)
            again.run()
            return weights(again), again.epoch

found = {}
with pretend_gpu.as_cuda():
    for preset in ("warm", "second-look"):
        one, with_copies = run(preset)
        kept, module.HalfWeights = module.HalfWeights, lambda *_, **__: kept([], [], None, torch.float16, one_pass=True)
        plain = run(preset)[1]
        module.HalfWeights = kept
        gone_on, epochs = resumed(preset)
        found[preset] = {
            "copies": [with_copies["copies"], plain["copies"]],
            "losses": [with_copies["losses"], plain["losses"]],
            "equal": torch.equal(with_copies["moved"], plain["moved"]),
            "moved": plain["moved"].abs().max().item(),
            "resumed": torch.equal(gone_on, weights(one)) and epochs == 3,
        }
    without = {"float32": {"dtype": "float32"}, "8 bit": {"optimizer": "adamw8bit"}, "parts": {"micro_batch_tokens": 8}}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in without.items():
            found[name] = len(trainer("warm", Path(folder) / name, **changes).halves.copies)
        found["adapters"] = len(trainer("lora", Path(folder) / "lora").halves.copies)
print(json.dumps(found))
"""


@needs_pretend_gpu
def test_trainings_on_a_pretend_card_with_copies_are_those_with_casts():
    found = on_pretend_card(PROGRAM)
    for preset, copies in (("warm", 2 * 5), ("second-look", 2 * 7)):
        seen = found[preset]
        assert seen["copies"] == [copies, 0]
        assert seen["losses"][0] == seen["losses"][1]
        assert len(seen["losses"][0]) == 2
        assert seen["equal"]
        assert seen["moved"] > 1e-4
        assert seen["resumed"]
    assert [found[name] for name in ("float32", "8 bit", "parts", "adapters")] == [0, 0, 0, 0]
