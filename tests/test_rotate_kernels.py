"""The GPU kernels of ``rotate_rows`` and its gradient: CUDA C++ and Triton emulated, Triton interpreted, and (``-m
gpu``) both on a card; and that a second look on a GPU calls them. That they compile for every card: test_cuda_kernels,
test_triton_kernels.

Shape legend: K tokens, H heads, E head size, F = E / 2, P rows of E numbers.
"""

import collections
import dataclasses
import os

import pytest
import test_attention as attention_cases
import torch
from cuda_cases import (
    DTYPES,
    compile_headers,
    cuda_card,
    emulated,
    mangled,
    moved,
    needs_pretend_gpu,
    on_pretend_card,
)
from layer_op_cases import assert_rounded_once, bits_equal, head_rows, randn

from cascade_fast.ops import backends
from cascade_fast.stages.attention import AttentionInputs, attend

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# (K, H, E, P): no token, no row, no number, one of each, every row, 16-byte words and not, more heads than a tile.
SHAPES = [(0, 2, 8, 5), (0, 2, 8, 0), (3, 2, 0, 7), (1, 1, 2, 1), (5, 3, 6, 40), (33, 2, 18, 66), (9, 9, 64, 90)]
SHAPES += [(7, 1, 66, 9), (3, 3, 272, 11), (2, 40, 128, 81)]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)


def truth_of(x, cos, sin, index, into, grad):
    """Result and gradient of ``x``, in float64."""
    x = x.double().requires_grad_()
    k, turned = len(index) // x.shape[1], x
    if cos.numel():
        (first, second), (c, s) = x[:k].chunk(2, dim=-1), (t.double()[:, None] for t in (cos, sin))
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    out = into.double().index_copy(0, index, turned[:k].flatten(0, 1))
    out.backward(grad.double())
    return out.detach(), x.grad


def check(body, shape, dtype, device="cpu", layout=lambda t: t):
    """Turned and as it is, with tokens beyond K, among rows of their own and among one row in memory."""
    x, *angles, index, into = (t.to(device) for t in head_rows(*shape, dtype, beyond=2))
    x[shape[0] :] = torch.nan  # stands nowhere
    grad, x = randn(*into.shape, dtype=dtype, seed=4).to(device), layout(x)
    zeros = into.new_zeros(1, into.shape[1]).expand(into.shape)
    for cos, sin in (angles, [torch.empty(0, device=device)] * 2):
        for room in (into, zeros, into.new_full(into.shape, torch.nan) if len(index) == len(into) else into):
            before = room.clone()
            out, wanted_grad = truth_of(x.nan_to_num(), cos, sin, index, room.nan_to_num(), grad)
            got = body("rotate_rows")(x, cos, sin, index, room)
            assert got.is_contiguous()
            assert_rounded_once(got, out, dtype)
            assert bits_equal([room], [before])
        got = body("rotate_rows_backward")(grad, cos, sin, index, *reversed(x.shape[:2]))
        assert_rounded_once(got, wanted_grad, dtype)
        assert not got[shape[0] :].any()


def tokens_apart(t):
    """A layout: tokens within wider rows, as of one product for queries, keys and values."""
    k, h, e = t.shape
    return torch.cat((t.flatten(1), torch.full_like(t.flatten(1), torch.nan)), dim=1)[:, : h * e].view(k, h, e)


# --- CUDA C++, emulated -----------------------------------------------------------------------------------------------


class Emulator:
    """The launchers of rotate_rows.cu over again, for the emulator. Outputs start poisoned.

    Attributes:
        options: of the launches.
        launch_bytes: what may be overwritten rather than looked for.
        stats: of all launches.
    """

    def __init__(self):
        lines = [
            f"template __global__ void rotate_rows_kernel<{t}, {width}, {back}>(RotatedRows<{t}>);"
            for dtype, t in DTYPES.items()
            for width in (16, dtype.itemsize)
            for back in ("false", "true")
        ]
        self.module = compile_headers(("rotate_rows", "scatter_rows"), lines)
        self.reset()

    def reset(self):
        self.options, self.launch_bytes, self.stats = {}, 1 << 20, []

    def body(self, op):
        return getattr(self, op)

    def launch(self, kernel, blocks, args, shared=0):
        self.stats.append(self.module.launch(kernel, blocks, 256, args, shared=shared, **self.options))

    def turn(self, x, cos, sin, index, rows, into=None, slots=None, turn=True, back=False):
        from ptxsim import Struct

        (tokens, heads, size), (p, _), item, dtype = x.shape, rows.shape, x.element_size(), x.dtype
        stride, into_stride = x.stride(0) if tokens > 1 else heads * size, into.stride(0) if into is not None else 0
        wide = all(n * item % 16 == 0 for n in (size // 2, stride, into_stride, x.storage_offset()))
        width = 16 if wide else item
        words, turned = size * item // width // 2, cos.numel() > 0
        block_rows, block_tokens = max(1, 256 // words), max(1, 256 // (heads * words))
        if turned:
            block_tokens = min(block_tokens, 4096 // size)
        placed = len(index) // heads
        turn_blocks = -(-(tokens if back else placed) // block_tokens) if turn else 0
        blocks = turn_blocks + (-(-p // block_rows) if into is not None else 0)
        pointers = [x, rows, into, *((cos, sin) if turned else (None, None)), index, slots]
        pointers = [0 if t is None else t for t in pointers]
        numbers = [stride, into_stride, tokens, placed, p, turn_blocks, heads, size // 2, block_tokens, block_rows]
        if blocks:
            name = f"rotate_rows_kernelI{mangled(dtype)}Li{width}ELb{int(back)}E"
            args = [Struct("Q" * 7 + "q" * 6 + "i" * 4, *pointers, *numbers)]
            self.launch(name, blocks, args, shared=block_tokens * size * 4 if turned else 0)

    def rotate_rows(self, x, cos, sin, index, into):
        from ptxsim import poison

        (p, size), placed = into.shape, len(index)
        out = poison(torch.empty(p, size, dtype=into.dtype))
        if p == 0 or size == 0:
            return out
        if placed == p:
            self.turn(x, cos, sin, index, out)
        elif 2 * placed * size * into.element_size() <= self.launch_bytes:
            self.turn(x, cos, sin, index, out, into, turn=False)
            self.turn(x, cos, sin, index, out)
        else:
            slots = torch.full((p,), -1, dtype=torch.int32)
            if placed:
                self.launch("scatter_rows_invert_kernel", -(-placed // 256), [index, placed, slots, p])
            self.turn(x, cos, sin, index, out, into, slots)
        return out

    def rotate_rows_backward(self, grad, cos, sin, index, heads, tokens):
        from ptxsim import poison

        out = poison(torch.empty(tokens, heads, grad.shape[1], dtype=grad.dtype))
        if out.numel():
            self.turn(out, cos, sin, index, grad, back=True)
        return out


@pytest.fixture(scope="module")
def compiled_emulator():
    return Emulator()


@pytest.fixture
def emulator(compiled_emulator):
    compiled_emulator.reset()
    return compiled_emulator


@emulated
class TestEmulatedCuda:
    """Right answers, no race, nothing out of bounds or uninitialised."""

    __test__ = not INTERPRETED

    @pytest.mark.parametrize("launch_bytes", [0, 1 << 20], ids=["rows looked for", "rows overwritten"])
    @DTYPE
    def test_answers(self, emulator, dtype, launch_bytes):
        emulator.launch_bytes = launch_bytes
        for shape in SHAPES:
            check(emulator.body, shape, dtype)

    @pytest.mark.parametrize("size", [64, 34])
    def test_tokens_apart_are_read_in_place(self, emulator, size):
        check(emulator.body, (5, 3, size, 31), torch.float16, layout=tokens_apart)

    def test_the_same_bits_in_any_order_of_blocks_and_warps(self, emulator):
        args, results, emulator.launch_bytes = head_rows(41, 3, 64, 300, torch.bfloat16), [], 0
        for emulator.options in ({}, {"seed": 1, "switch_every": 3}, {"lockstep": "warp", "uninit_shared": True}):
            out = emulator.rotate_rows(*args)
            results.append([out, emulator.rotate_rows_backward(out, *args[1:4], 3, 43)])
        assert bits_equal(results[0], results[1])
        assert bits_equal(results[0], results[2])

    def test_an_index_out_of_range_writes_nothing(self, emulator):
        x, cos, sin, index, into = head_rows(3, 2, 16, 20)
        index[1], index[4] = -1, 20
        for emulator.launch_bytes in (0, 1 << 20):
            out = emulator.rotate_rows(x, cos, sin, index, into)
            kept = [row for row in range(20) if row not in index.tolist()]
            assert torch.equal(out[kept], into[kept])
        grads = emulator.rotate_rows_backward(into, cos, sin, index, 2, 3).flatten(0, 1)
        assert not grads[[1, 4]].any()

    @pytest.mark.parametrize(("heads", "size"), [(9, 64), (3, 64), (8, 128)])
    def test_bytes_moved_are_what_they_must_be(self, emulator, heads, size):
        k, rows, emulator.launch_bytes = 64, 64 * heads * 2, 0
        x, cos, sin, index, into = head_rows(k, heads, size, rows, torch.float16)
        read = k * heads * (2 * size + 8) + k * size * 4  # heads, index and angles
        emulator.rotate_rows(x, cos, sin, index, into)
        kept = (rows - k * heads) * size * 2
        assert moved(emulator.stats[-1]) <= 1.05 * (read + kept + rows * (2 * size + 4))
        emulator.stats.clear()
        emulator.rotate_rows_backward(into, cos, sin, index, heads, k)
        assert len(emulator.stats) == 1
        assert moved(*emulator.stats) <= 1.05 * (read + 2 * k * heads * size)


# --- Triton -----------------------------------------------------------------------------------------------------------


def launcher(op):
    return pytest.importorskip("cascade_kernels.launchers").LAUNCHERS[op]


class TestInterpretedTriton:
    __test__ = INTERPRETED

    @DTYPE
    def test_answers(self, dtype):
        for shape in SHAPES:
            check(launcher, shape, dtype)

    def test_tokens_apart_are_read_in_place(self):
        check(launcher, (5, 3, 34, 31), torch.float16, layout=tokens_apart)


@pytest.mark.emulated
class TestEmulatedTriton:
    """Compiled for sm_75 and executed, programs interleaved at random, every access checked and counted."""

    __test__ = not INTERPRETED

    @pytest.fixture
    def device(self):
        pytest.importorskip("triton")
        adapter = pytest.importorskip("ptxsim.triton_device", reason="the optional module ptxsim is not on PYTHONPATH")
        return lambda **options: adapter.emulated(capability=75, poison_empty=True, **options)

    @pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (5, 3, 6, 40)), (torch.float16, (9, 9, 64, 90))])
    def test_answers(self, device, dtype, shape):
        with device(seed=1, switch_every=3):
            check(launcher, shape, dtype)

    @pytest.mark.parametrize(("heads", "size"), [(9, 64), (8, 128)])
    def test_bytes_moved_are_what_they_must_be(self, device, heads, size):
        x, cos, sin, index, into = head_rows(16, heads, size, 32 * heads, torch.float16)
        with device() as record:
            out = launcher("rotate_rows")(x, cos, sin, index, into)
            launcher("rotate_rows_backward")(out, cos, sin, index, heads, 16)
        assert len(record.launches) == 2  # beside torch's copy of `into`
        for launch in record.launches:
            assert launch.moved_bytes <= 1.05 * 16 * (heads * (4 * size + 8) + size * 4), launch.summary()


# --- a second look's step ---------------------------------------------------------------------------------------------


def attention_of_a_pack(device, everyone):
    """What the tokens of a pack attend to, what they leave, and gradients."""
    pack = attention_cases._pack((17, 9, 4), everyone)
    k, generator, size = len(pack.position_K), torch.Generator().manual_seed(2), attention_cases.E
    groups, heads = attention_cases.G, attention_cases.H
    tensors = [torch.randn(k, n, size, generator=generator) for n in (heads, groups, groups, heads)]
    *tensors, grad = (t.to(device) for t in tensors)
    angle = (pack.position_K[:, None] * 0.5 ** torch.arange(size // 2)).repeat(1, 2).to(device)
    fields = {n: v.to(device) for n, v in vars(pack).items() if isinstance(v, torch.Tensor)}
    pack, shape, left = dataclasses.replace(pack, **fields), (2, 2, groups, size), []
    inputs = AttentionInputs.from_pack(pack, heads, shape, angle.cos(), angle.sin(), leaves=True)
    tensors = [t.requires_grad_() for t in tensors]
    attended = attend(*tensors, inputs, 1, left)
    grads = torch.autograd.grad((attended, left[0]), tensors, (grad, torch.ones_like(left[0])))
    return [t.detach().cpu() for t in (attended, *left, *grads)]


def attention_beside_the_cpu(everyone):
    """Calls by operator of attention on a pretend card, and how far it is from the CPU's; where pretend_gpu is."""
    import pretend_gpu

    wanted = attention_of_a_pack("cpu", everyone)
    with pretend_gpu.as_cuda(), pretend_gpu.ledger() as led:
        got = attention_of_a_pack("cuda", everyone)
    calls = collections.Counter(k.op.split(".")[1] for k in led.kernels if "cascade_fast" in k.op)
    return calls, max((a - b).abs().max().item() for a, b in zip(wanted, got, strict=True))


# Where there is no place_heads. The card's kernels cannot run here: the extension's CPU bodies stand in for them.
PRETEND = """
import json, pretend_gpu
pretend_gpu.install("gpu", card="t4", poison=True)
import test_rotate_kernels as cases
from cascade_fast.ops import backends

plain = backends._native_op
backends._native_op = lambda op, key: plain(op, "CPU") if op in backends.LAYER_OPS else plain(op, key)
print(json.dumps([cases.attention_beside_the_cpu(everyone) for everyone in (False, True)]))
"""


@needs_pretend_gpu
def test_attention_on_a_pretend_card():
    for calls, off in on_pretend_card(PRETEND):
        # Queries, keys and values, and the gradient of each; what was attended to, and of the keys that are left.
        assert calls == {"rotate_rows": 5, "rotate_rows_backward": 5}
        assert off < 1e-5


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def card(request):
    """The device, and a backend's name."""
    if request.param == "cuda":
        return cuda_card("rotate_rows"), "cuda"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device()), "triton"


@pytest.mark.gpu
@DTYPE
def test_gpu_answers(card, dtype):
    device, backend = card
    for shape in [*SHAPES, (4000, 9, 64, 50_000), (512, 32, 128, 16_384)]:
        check(lambda op: backends.body(op, device, backend), shape, dtype, device)
    check(lambda op: backends.body(op, device, backend), (5, 3, 34, 31), dtype, device, tokens_apart)


@pytest.mark.gpu
def test_gpu_opcheck(card):
    device, backend = card
    x, *rest = (t.to(device) for t in head_rows(7, 3, 32, 40, torch.float16, beyond=2))
    check_op, native, to = torch.library.opcheck, torch.ops.cascade_fast, {"backend": backend}
    check_op(native.rotate_rows.default, (x.requires_grad_(), *rest), to)
    check_op(native.rotate_rows_backward.default, (rest[-1], *rest[:3], 3, 9), to)
