"""The CUDA kernel of adamw8bit, emulated on the CPU and (``-m gpu``) run on a card; the optimizer that calls it."""

import copy
import math

import op_cases as cases
import pytest
import torch
from cuda_cases import DTYPES, compile_headers, cuda_card, emulated, mangled

from cascade_fast import ops
from cascade_fast.ops import reference
from cascade_fast.settings import RunSettings
from cascade_fast.training.adamw8bit import AdamW8bit
from cascade_fast.training.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors

CHUNK, TENSORS = 8192, 64  # values of a thread block, tensors of a launch
SHAPES = [(1,), (255,), (3, 0, 5), (256,), (37, 41), (CHUNK + 257,)]
SETTINGS = cases.ADAMW_SETTINGS


class Emulator:
    """The launcher of adamw8bit.cu over again: one launch, for at most 64 tensors of one dtype and step."""

    def __init__(self):
        lines = [
            f"template __global__ void adamw8bit_kernel<{t}>(const __grid_constant__ StepList, int, StepSettings);"
            for t in DTYPES.values()
        ]
        self.module = compile_headers(["adamw8bit"], lines)

    def step(self, params, grads, state1, state2, absmax1, absmax2, steps, scalars=(None, None, None), **options):
        from ptxsim import Struct

        s = SETTINGS
        used = [i for i, p in enumerate(params) if p.numel() > 0]
        columns = [[column[i] for i in used] for column in (params, grads, state1, state2)]
        columns += [[scale[i] if scale[i].numel() else 0 for i in used] for scale in (absmax1, absmax2)]
        sizes = [params[i].numel() for i in used]
        columns.append(sizes)
        first, blocks = [], 0
        for n in sizes:
            first.append(blocks)
            blocks += -(-n // CHUNK)
        flat = [x for column in (*columns, first) for x in column + [0] * (TENSORS - len(used))]
        tensors = Struct("Q" * 6 * TENSORS + "q" * TENSORS + "i" * TENSORS, *flat)
        numbers = [s["beta1"], 1 - s["beta1"], s["beta2"], 1 - s["beta2"], math.log(s["beta1"]), math.log(s["beta2"])]
        numbers += [s["lr"], 1 - s["lr"] * s["weight_decay"], s["eps"], float(steps[0])]
        settings = Struct("f" * 10 + "QQQ", *numbers, *(0 if x is None else x for x in scalars))
        name = f"adamw8bit_kernelI{mangled(grads[0].dtype)}"
        return self.module.launch(name, blocks, 256, [tensors, len(used), settings], **options)


@pytest.fixture(scope="module")
def emulator():
    return Emulator()


def arguments(shapes, dtype=torch.float32, coded=lambda i: True, step=3):
    """All tensors at one step, as a launch has them."""
    args = cases.adamw8bit_arguments(shapes, dtype, coded)
    return (*args[:6], [step] * len(shapes))


def assert_same_step(ours, theirs):
    """Equal to rounding; codes to one, and hardly ever that."""
    for place in (0, 2, 3, 4, 5):
        for a, b in zip(ours[place], theirs[place], strict=True):
            if a.dtype == torch.uint8:
                difference = (a.int() - b.int()).abs()
                assert not (difference > 1).any()
                assert difference.sum() <= 1 + a.numel() // 1000
            elif a.numel() > 0:  # where old moment and gradient cancel, or a second moment of code 0 divides
                finite = b[b.isfinite()].abs()
                most = finite.max().item() if finite.numel() else 0.0
                torch.testing.assert_close(a, b, atol=1e-6 * most, rtol=2e-6, equal_nan=True)


def check(emulator, args, scalars=(None, None, None), **options):
    theirs = copy.deepcopy(args)
    stats = emulator.step(*args, scalars, **options)
    reference.adamw8bit(*theirs, *SETTINGS.values(), *scalars)
    assert_same_step(args, theirs)
    return stats


# --- emulated: right answers, no race, nothing out of bounds ---------------------------------------------------------


@emulated
@pytest.mark.parametrize("coded", [True, False], ids=["coded", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_a_step_is_the_references(emulator, dtype, coded):
    check(emulator, arguments(SHAPES, dtype, lambda i: coded and i != 1))


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_tensors_may_start_anywhere(emulator, dtype):
    args = arguments([(700,), (600,)], dtype, lambda i: i == 0)
    for place, i in ((0, 0), (1, 0), (2, 0), (3, 0), (1, 1)):  # all of the first tensor, the second's gradient alone
        t = args[place][i]
        args[place][i] = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].copy_(t)
    check(emulator, args)


@emulated
def test_first_steps_from_nothing_with_blocks_of_zeros(emulator):
    args = arguments([(1000,)], step=1)
    for place in (2, 3, 4, 5):
        args[place][0].zero_()
    args[1][0][256:512] = 0.0
    for step in (1, 2, 3):
        check(emulator, (*args[:6], [step]))
    assert not args[4][0][1]  # scales of nothing
    assert not args[2][0][256:512].any()  # whose codes are 0


@emulated
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_gradients_that_are_not_finite(emulator, value):
    args = arguments([(600,)])
    args[1][0][300] = value
    for step in (3, 4):
        check(emulator, (*args[:6], [step]))
    assert args[0][0].isnan().any() == (not abs(value) < 1e29)


@emulated
def test_scaled_gradients_and_steps_left_out(emulator):
    scaled, plain = arguments([(5000,), (90,)], step=7), arguments([(5000,), (90,)], step=5)
    for g in scaled[1]:
        g *= 4096.0
    number = torch.tensor
    before = copy.deepcopy(scaled)
    emulator.step(*scaled, (number(4096.0), number(1.0), number(2.0)))
    assert all(torch.equal(a, b) for a, b in zip(cases.flat(scaled), cases.flat(before), strict=True))
    emulator.step(*scaled, (number(4096.0), number(0.0), number(2.0)))
    emulator.step(*plain)
    for place in (0, 2, 3, 4, 5):
        assert all(torch.equal(a, b) for a, b in zip(scaled[place], plain[place], strict=True))


@emulated
@pytest.mark.parametrize("signed", [True, False])
def test_every_point_of_the_grid_gets_the_code_that_it_gets_on_the_cpu(emulator, signed):
    """A first step makes the moments multiples of the gradient: every representable ratio to the largest comes by."""
    cases.need("cpp")
    points = torch.arange(0 if signed else 32768, 65536)
    ratio = (2.0 * points.double() - 65535) / 65535
    grad = torch.nn.functional.pad(ratio if signed else ratio.sqrt(), (0, -len(points) % 255), value=0.5)
    grad = torch.nn.functional.pad(grad.view(-1, 255), (0, 1), value=1.0).flatten().float()  # the largest of its block
    n = grad.numel()
    zeros = [[torch.zeros(n, dtype=torch.uint8)] for _ in range(2)] + [[torch.zeros(n // 256)] for _ in range(2)]
    args = ([torch.zeros(n)], [grad], *zeros, [1])
    cpu = copy.deepcopy(args)
    emulator.step(*args)
    ops.adamw8bit(*cpu, **SETTINGS, backend="cpp")
    assert all(torch.equal(args[place][0], cpu[place][0]) for place in (2, 3, 4, 5))
    assert len(args[2 if signed else 3][0].unique()) > 230  # codes finer than the grid are never written


@emulated
@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 16), (torch.float16, 14)], ids=str)
def test_traffic_is_compulsory(emulator, dtype, bytes_each):
    n = 2 * CHUNK
    stats = check(emulator, arguments([(n,)], dtype))
    assert stats.moved_bytes <= 1.05 * (bytes_each * n + 16 * n // 256)


# --- the optimizer ---------------------------------------------------------------------------------------------------


def parameters(device="cpu", shapes=((64, 80), (5001,), (30, 30))):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) / 20).to(device)) for shape in shapes]


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-2 * scale).to(p.device)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_steps_left_out_do_not_count(backend, monkeypatch):
    """Some with a parameter that has no gradient yet: its first step is its first."""
    monkeypatch.setenv("CASCADE_FAST_BACKEND", cases.need(backend))
    ours, theirs = parameters(), parameters()
    folded, plain = (AdamW8bit(params, lr=1e-3) for params in (ours, theirs))
    for step in range(8):
        left_out = step in (0, 2, 5)
        give_gradients(ours, step, scale=1024.0)
        give_gradients(theirs, step)
        if step < 4:
            ours[2].grad = theirs[2].grad = None
        folded.grad_scale, folded.found_inf = torch.tensor(1024.0), torch.tensor(float(left_out))
        folded.step()
        if not left_out:
            plain.step()
    a, b = folded.state_dict()["state"], plain.state_dict()["state"]
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert a[i]["step"] == b[i]["step"] == (5 if i < 2 else 3)
        torch.testing.assert_close(p, q, atol=1e-8, rtol=1e-6)
    folded.step()  # goes on after being asked
    plain.step()
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-8, rtol=1e-6)


def test_a_scalar_of_another_kind_is_named():
    args = cases.adamw8bit_arguments([(60, 90)])
    with pytest.raises(ValueError, match=r"found_inf: \(1,\) float32 on cpu; must be one float32 number \(\) on cpu"):
        ops.adamw8bit(*args, **SETTINGS, found_inf=torch.zeros(1))


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_on_a_gpu_ours_is_taken_where_its_kernel_is(name, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    gpu = torch.device("cuda")  # named only
    kinds = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": bnb.optim.PagedAdamW8bit}
    settings = RunSettings(optimizer=name)
    monkeypatch.setattr(ops, "why_not", lambda op, device, backend: "none")
    assert type(build_optimizer(parameters(), settings, gpu)) is kinds[name]
    monkeypatch.setattr(ops, "why_not", lambda op, device, backend: None)
    wanted = {"adamw8bit": AdamW8bit, "paged_adamw8bit": kinds["paged_adamw8bit"]}
    assert type(build_optimizer(parameters(), settings, gpu)) is wanted[name]


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_gpu_step_is_the_cpus(dtype):
    device = cuda_card("adamw8bit")
    shapes = [*SHAPES, *[(700 + i,) for i in range(150)], (1000, 3001)]  # several launches
    cpu = cases.adamw8bit_arguments(shapes, dtype, lambda i: i % 7 != 1)  # each tensor with a step of its own
    for args in (cpu, arguments(shapes, dtype)):
        gpu = tuple([t.to(device) if isinstance(t, torch.Tensor) else t for t in column] for column in args)
        ops.adamw8bit(*args, **SETTINGS)
        ops.adamw8bit(*gpu, **SETTINGS, backend="cuda")
        assert_same_step(tuple([t.cpu() if isinstance(t, torch.Tensor) else t for t in c] for c in gpu), args)


@pytest.mark.gpu
def test_gpu_optimizer_never_waits_and_its_state_loads_on_the_cpu_and_back():
    device = cuda_card("adamw8bit")
    settings = RunSettings(optimizer="adamw8bit", lr=1e-3)
    params = {where: parameters(where) for where in ("cpu", device)}
    optimizers = {where: build_optimizer(params[where], settings, torch.device(where)) for where in params}
    for step in range(12):
        for where, optimizer in optimizers.items():
            give_gradients(params[where], step)
            optimizer.found_inf = torch.tensor(float(step == 3), device=where)
            torch.cuda.set_sync_debug_mode("error" if where == device else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        for p, q in zip(*params.values(), strict=True):
            torch.testing.assert_close(p, q.cpu(), atol=1e-5, rtol=1e-4)
        source, target = ("cpu", device) if step % 2 else (device, "cpu")
        if step % 4 > 1:  # from one state again, handed over each way in turn
            load_optimizer_tensors(optimizers[target], *optimizer_tensors(optimizers[source]))
            with torch.no_grad():
                for p, q in zip(params[source], params[target], strict=True):
                    q.copy_(p)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers.values()]
    assert [entries["step"] for state in states for entries in state.values()] == [11] * 6
