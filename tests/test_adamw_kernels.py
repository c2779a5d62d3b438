"""The CUDA kernels of adamw_ and grad_norm, emulated on the CPU and (``-m gpu``) run on a card."""

import copy
import math

import op_cases as cases
import pytest
import torch
from cuda_cases import DTYPES, compile_headers, cuda_card, emulated

from cascade_fast import ops
from cascade_fast.ops import reference

SETTINGS = cases.ADAMW_SETTINGS
CHUNK, NORM_CHUNK, TENSORS, GRADS, COUNTERS = 8192, 32768, 64, 190, 500
KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
HALVES = (torch.float16, torch.bfloat16)
SHAPES = [(1,), (3, 0, 5), (255,), (4, 64), (37, 41), (CHUNK + 257,), (3, 5)]


def blocks_of(tensors, chunk):
    """The first block of each, and how many blocks there are."""
    first = [0]
    for t in tensors:
        first.append(first[-1] + -(-t.numel() // chunk))
    return first[:-1], first[-1]


def padded(column, room):
    return [*column, *[0] * (room - len(column))]


class Emulator:
    """The launchers of adamw.cu and grad_norm.cu over again: one launch of each kernel, for a list that fits."""

    def __init__(self):
        # Of 64 tensors: the emulator has no room for the arguments of 512.
        line = "template __global__ void adamw_kernel<64>(const __grid_constant__ AdamWList<64>, int, AdamWSettings);"
        self.module = compile_headers(["adamw", "grad_norm"], [line])

    def step(self, params, grads, moments1, moments2, steps, copies, numbers=(None, None, None), **options):
        from ptxsim import Struct

        found_inf = 0 if numbers[2] is None else numbers[2]
        counters = Struct("Q" * COUNTERS, *padded(steps, COUNTERS))
        self.module.launch("adamw_count_kernel", 1, 512, [counters, len(steps), found_inf], **options)
        used = [i for i, p in enumerate(params) if p.numel() > 0]
        first, blocks = blocks_of([params[i] for i in used], CHUNK)
        copied = [copies[i] if copies[i].numel() else 0 for i in used]
        columns = [[column[i] for i in used] for column in (params, grads, moments1, moments2)]
        columns += [copied, [steps[i] for i in used], [params[i].numel() for i in used], first]
        columns += [[KINDS[grads[i].dtype] for i in used]]
        columns += [[KINDS[copies[i].dtype] if copies[i].numel() else 0 for i in used]]
        flat = [x for column in columns for x in padded(column, TENSORS)]
        tensors = Struct("Q" * 6 * TENSORS + "q" * TENSORS + "i" * TENSORS + "B" * 2 * TENSORS, *flat)
        s = SETTINGS
        floats = [s["beta1"], 1 - s["beta1"], s["beta2"], 1 - s["beta2"], math.log(s["beta1"]), math.log(s["beta2"])]
        floats += [s["lr"], s["weight_decay"], s["eps"]]
        settings = Struct("f" * 9 + "QQQ", *floats, *(0 if x is None else x for x in numbers))
        return self.module.launch(f"adamw_kernelILi{TENSORS}E", blocks, 256, [tensors, len(used), settings], **options)

    def norm(self, grads, scale, clip, **options):
        from ptxsim import Struct

        used = [g for g in grads if g.numel() > 0]
        first, blocks = blocks_of(used, NORM_CHUNK)
        columns = [used, [g.numel() for g in used], first, [KINDS[g.dtype] for g in used]]
        flat = [x for column in columns for x in padded(column, GRADS)]
        listed = Struct("Q" * GRADS + "q" * GRADS + "i" * GRADS + "B" * GRADS, *flat)
        parts, results = torch.full((blocks,), torch.nan), [torch.full((), torch.nan) for _ in range(3)]
        stats = self.module.launch("grad_norm_parts_kernel", blocks, 256, [listed, len(used), parts], **options)
        self.module.launch("grad_norm_kernel", 1, 256, [parts, blocks, scale, clip, *results], **options)
        return results, stats


@pytest.fixture(scope="module")
def emulator():
    return Emulator()


def assert_same_step(ours, theirs):
    """Equal to rounding; copies are the parameters, rounded."""
    for place in (0, 2, 3, 4):
        for a, b in zip(ours[place], theirs[place], strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6, equal_nan=True)
    for param, made in zip(ours[0], ours[5], strict=True):
        assert made.numel() == 0 or torch.equal(made, param.to(made.dtype))


# --- emulated: right answers, no race, nothing out of bounds ---------------------------------------------------------


@emulated
def test_a_step_is_the_references_whatever_the_dtypes_in_a_list(emulator):
    args = cases.adamw_arguments(SHAPES * 3, tuple(DTYPES), (None, *HALVES, None, torch.float16))
    theirs = copy.deepcopy(args)
    emulator.step(*args)
    reference.adamw_(*theirs, *SETTINGS.values(), None, None, None)
    assert_same_step(args, theirs)


@emulated
def test_tensors_may_start_anywhere(emulator):
    args = cases.adamw_arguments([(700,)] * 5, (torch.float16,), (torch.float16,))
    for place in (0, 1, 2, 3, 5):
        t = args[place][place % 5]
        args[place][place % 5] = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].copy_(t)
    theirs = copy.deepcopy(args)
    emulator.step(*args)
    reference.adamw_(*theirs, *SETTINGS.values(), None, None, None)
    assert_same_step(args, theirs)


@emulated
def test_numbers_on_the_device_and_a_full_list(emulator):
    """A step that is left out changes nothing; the rate there is the one that counts."""
    args = cases.adamw_arguments([(5,)] * 63 + [(600,)], (torch.float16, torch.float32), (None, torch.float16))
    numbers = torch.tensor(1e-2), torch.tensor(64.0), torch.tensor(1.0)
    theirs = copy.deepcopy(args)
    emulator.step(*args, numbers)
    assert all(torch.equal(a, b) for a, b in zip(cases.flat(args), cases.flat(theirs), strict=True))
    numbers[2].zero_()
    emulator.step(*args, numbers)
    reference.adamw_(*theirs, *SETTINGS.values(), *numbers)
    assert_same_step(args, theirs)


@emulated
@pytest.mark.parametrize(
    ("dtype", "copied", "bytes_each"), [(torch.float32, None, 28), (torch.float16, torch.float16, 28)]
)
def test_traffic_is_compulsory(emulator, dtype, copied, bytes_each):
    args = cases.adamw_arguments([(2 * CHUNK,)], (dtype,), (copied,))
    stats = emulator.step(*args)
    assert stats.moved_bytes <= 1.05 * bytes_each * 2 * CHUNK


@emulated
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_norm_and_factors_are_the_references(emulator, scale, clip):
    args = cases.adamw_arguments([*SHAPES, (NORM_CHUNK + 77,)], tuple(DTYPES))
    args[1][4] = torch.zeros(37 * 41 + 1)[1:].copy_(args[1][4].flatten())  # starts between words
    scale = None if scale is None else torch.tensor(scale)
    ours, stats = emulator.norm(args[1], scale, clip)
    torch.testing.assert_close(tuple(ours), reference.grad_norm(args[1], scale, clip), atol=0, rtol=1e-6)
    assert stats.moved_bytes <= 1.1 * sum(g.nbytes for g in args[1])


@emulated
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_found(emulator, value):
    grads = [torch.ones(70, dtype=torch.float16), torch.ones(9)]
    grads[0][69] = value
    (norm, _, found_inf), _ = emulator.norm(grads, torch.tensor(8.0), 1.0)
    assert not norm.isfinite()
    assert found_inf == 1


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_step_and_norm_are_the_cpus():
    device = cuda_card("adamw_")
    shapes = [*SHAPES, *[(700 + i,) for i in range(600)], (1000, 3001)]  # several launches
    cpu = cases.adamw_arguments(shapes, tuple(DTYPES), (None, *HALVES, None, torch.float16))
    gpu = tuple([t.to(device) for t in column] for column in cpu)
    scale = torch.tensor(4.0)
    ours, again = (ops.grad_norm(gpu[1], scale.to(device), 1.0, backend="cuda") for _ in range(2))
    theirs = ops.grad_norm(cpu[1], scale, 1.0)
    torch.testing.assert_close([x.cpu() for x in ours], list(theirs), atol=0, rtol=2e-6)
    assert all(map(torch.equal, ours, again))
    ops.adamw_(*cpu, **SETTINGS, grad_scale=theirs[1], found_inf=theirs[2])
    ops.adamw_(*gpu, **SETTINGS, grad_scale=theirs[1].to(device), found_inf=ours[2], backend="cuda")
    assert_same_step(tuple([t.cpu() for t in column] for column in gpu), cpu)
