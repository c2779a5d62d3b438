"""``place_heads`` and ``take_heads``: plain torch against float64, their CUDA kernel emulated, attention by them on a
pretend card, and (``-m gpu``) on a card. That it compiles for every card: test_cuda_kernels.

Shape legend: K tokens, B sequences, Q and S places of each, G groups, T heads of a group, E head size, R = T * Q.
"""

import pytest
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
from layer_op_cases import assert_rounded_once, bits_equal, randn

from cascade_fast import ops
from cascade_fast.ops import backends, reference

# (K, B, Q, S, G, T, E): one of each, no token, no number, heads of odd halves, every place taken, 16-byte words.
SHAPES = [(1, 1, 1, 1, 1, 1, 2), (0, 2, 3, 4, 1, 2, 8), (3, 1, 4, 5, 1, 2, 0), (7, 2, 5, 9, 2, 3, 6)]
SHAPES += [(12, 2, 6, 6, 3, 1, 34), (9, 2, 16, 21, 3, 3, 64), (5, 1, 16, 11, 1, 4, 272)]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)


def inputs_of(shape, dtype, device="cpu", seed=0):
    """Arguments of ``place_heads``, and gradients of what it returns, in memory as attention leaves them."""
    k, b, q, s, groups, times, size = shape
    generator = torch.Generator().manual_seed(seed)
    slot, place = (torch.randperm(b * n, generator=generator)[:k] for n in (q, s))
    maps = [torch.full((b * n,), -1, dtype=torch.int32) for n in (q, s)]
    for map_, index in zip(maps, (slot, place), strict=True):
        map_[index] = torch.arange(k, dtype=torch.int32)
    heads = [randn(k, n, size, dtype=dtype, seed=i) for i, n in enumerate((groups * times, groups, groups))]
    angle = randn(k, size // 2, seed=3) * 3
    kept = [randn(b * groups * s, size, dtype=dtype, seed=i) for i in (4, 5)]
    maps = [map_.view(b, -1) for map_ in maps]
    grads = [
        randn(b, n, groups, size, dtype=dtype, seed=6 + i).transpose(1, 2) for i, n in enumerate((times * q, s, s))
    ]
    args = *heads, angle.cos(), angle.sin(), slot, place, *maps, *kept
    return [t.to(device) for t in args], size**-0.5 if size else 1.0, [t.to(device) for t in grads]


def turned(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def truth_of(args, scale, grads):
    """Results and gradients, in float64, head by head."""
    query, key, value, cos, sin, slot, place, slots, places, *kept = args
    inputs = [t.double().requires_grad_() for t in (query, key, value)]
    cos, sin, (b, groups) = cos.double()[:, None], sin.double()[:, None], (slots.shape[0], key.shape[1])
    times = query.shape[1] // groups

    def placed(x_KHE, index_K, n, into):
        room = into.double().reshape(b, x_KHE.shape[1], n, x_KHE.shape[2]).transpose(1, 2).flatten(0, 1)
        return room.index_copy(0, index_K, x_KHE).unflatten(0, (b, n)).transpose(1, 2)

    q, s = slots.shape[1], places.shape[1]
    zeros = torch.zeros(b * groups * times * q, query.shape[2], device=query.device)
    outputs = [
        placed(turned(inputs[0], cos, sin) * scale, slot, q, zeros).reshape(b, groups, times * q, query.shape[2]),
        placed(turned(inputs[1], cos, sin), place, s, kept[0]),
        placed(inputs[2], place, s, kept[1]),
    ]
    found = torch.autograd.grad(outputs, inputs, [grad.double() for grad in grads])
    return [t.detach() for t in outputs], found


def check(body, shape, dtype, device="cpu", layout=lambda t: t):
    args, scale, grads = inputs_of(shape, dtype, device)
    args[:3] = map(layout, args[:3])
    cos, sin, slot, place, slots, places, *kept = args[3:]
    times = shape[5]
    zeros = kept[0].new_zeros(1, kept[0].shape[1]).expand(kept[0].shape)
    for there in (kept, (zeros, zeros)):
        wanted, of_inputs = truth_of([*args[:9], *there], scale, grads)
        got = body("place_heads")(*args[:3], cos, sin, slots, places, *there, scale)
        for one, other in zip(got, wanted, strict=True):
            assert one.is_contiguous()
            assert_rounded_once(one, other, dtype)
    got = body("place_heads_backward")(*grads, cos, sin, slot, place, times, scale)
    for one, other in zip(got, of_inputs, strict=True):
        assert_rounded_once(one, other, dtype)
    taken = body("take_heads")(grads[0], slot, times)
    b, groups, rows, size = grads[0].shape
    by_place = grads[0].reshape(b, groups * times, rows // times, size).transpose(1, 2).flatten(0, 1)
    assert torch.equal(taken, by_place[slot])
    back = body("take_heads_backward")(args[0], slots, times)
    assert back.transpose(1, 2).is_contiguous()
    assert torch.equal(body("take_heads")(back, slot, times), args[0])
    assert int(back.count_nonzero()) == int(args[0].count_nonzero())  # zero elsewhere


def tokens_apart(t):
    """A layout: tokens within wider rows, as of one product for queries, keys and values."""
    k, h, e = t.shape
    return torch.cat((t.flatten(1), torch.full_like(t.flatten(1), torch.nan)), dim=1)[:, : h * e].view(k, h, e)


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_torch(shape, dtype):
    check(lambda op: getattr(reference, op), shape, dtype)


def gradients(args, scale, grads):
    query, key, value = (t.detach().clone().requires_grad_() for t in args[:3])
    placed = ops.place_heads(query, key, value, *args[3:], scale)
    times = query.shape[1] // key.shape[1]
    taken = ops.take_heads(placed[0], args[5], args[7], times)
    found = torch.autograd.grad((*placed, taken), (query, key, value), (*grads, torch.ones_like(taken)))
    return [t.detach() for t in (*placed, taken)], found


def test_gradients_of_both():
    args, scale, grads = inputs_of((7, 2, 5, 9, 2, 3, 6), torch.float32)
    outputs, found = gradients(args, scale, grads)
    torch.testing.assert_close(outputs[3], turned(args[0], args[3][:, None], args[4][:, None]) * scale)
    with_ones = grads[0].clone()
    b, groups, rows, size = with_ones.shape
    by_place = with_ones.reshape(b, groups, 3, rows // 3, size).permute(0, 3, 1, 2, 4).flatten(0, 1)
    by_place[args[5]] += 1
    with_ones = by_place.unflatten(0, (b, rows // 3)).permute(0, 2, 3, 1, 4).reshape(grads[0].shape)
    for one, other in zip(found, truth_of(args, scale, [with_ones, *grads[1:]])[1], strict=True):
        torch.testing.assert_close(one, other.float())


def check_op(device, backend):
    args, scale, grads = inputs_of((7, 2, 5, 9, 2, 3, 8), torch.float16, device)
    args[:3] = (t.requires_grad_() for t in args[:3])
    native, to = torch.ops.cascade_fast, {"backend": backend}
    torch.library.opcheck(native.place_heads.default, (*args, scale), to)
    torch.library.opcheck(native.place_heads_backward.default, (*grads, *args[3:7], 3, scale), to)
    torch.library.opcheck(native.take_heads.default, (grads[0].requires_grad_(), args[5], args[7], 3), to)
    torch.library.opcheck(native.take_heads_backward.default, (args[0].detach(), args[7], 3), to)


def test_opcheck():
    check_op("cpu", "reference")


WRONG = {
    "query": (torch.zeros(3, 12), "3 dimensions"),
    "key": (torch.zeros(3, 3, 4), "divisor of its heads"),
    "value": (torch.zeros(3, 2, 4).half(), "like query"),
    "sin": (torch.zeros(3, 3), r"shape \(3, 2\)"),
    "slot": (torch.zeros(3, dtype=torch.int32), r"int64 of shape \(3,\)"),
    "token_of_place": (torch.zeros(3, 5, dtype=torch.int32), "2 rows"),
    "values": (torch.zeros(20, 4).half(), r"shape \(20, 4\) and the dtype of query"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_argument_is_named(name):
    args, scale, _ = inputs_of((3, 2, 4, 5, 2, 2, 4), torch.float32)
    names = "query", "key", "value", "cos", "sin", "slot", "place", "token_of_slot", "token_of_place", "keys", "values"
    value, message = WRONG[name]
    args[names.index(name)] = value
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        ops.place_heads(*args, scale)


# --- CUDA C++, emulated -----------------------------------------------------------------------------------------------


class Emulator:
    """The launchers of place_heads.cu over again, for the emulator. Outputs start poisoned."""

    def __init__(self):
        lines = [
            f"template __global__ void place_heads_kernel<{t}, {width}, {back}>(PlacedHeads<{t}>);"
            for dtype, t in DTYPES.items()
            for width in (16, dtype.itemsize)
            for back in ("false", "true")
        ]
        self.module = compile_headers(("place_heads",), lines)
        self.options, self.stats = {}, []

    def body(self, op):
        return getattr(self, op)

    def launch(self, parts, cos, sin, back):
        """``parts``: (x, rows, index, into, N, scale, turned) each."""
        from ptxsim import Struct

        x = parts[0][0]
        size, item = x.shape[2], x.element_size()
        if size == 0:
            return
        strides = [n for x, rows, _, into, *_ in parts for n in (x.stride(0), *rows.stride()[:3])]
        strides += [into.stride(0) for _, _, _, into, *_ in parts if into is not None]
        begins = [t.storage_offset() for part in parts for t in (part[0], part[1], part[3]) if t is not None]
        wide = all(n * item % 16 == 0 for n in (size // 2, *strides, *begins))
        width = 16 if wide else item
        words, layout, fields, blocks, shared = size * item // width // 2, "", [], 0, 0
        for x, rows, index, into, n, scale, turns in parts:
            heads = x.shape[1]
            units = max(1, 256 // (heads * words))
            if turns:
                units = min(units, 4096 // size)
                shared = max(shared, units * size * 4)
            layout += "Q" * 5 + "q" * 8 + "i" * 4 + "f?"
            fields += [x, rows, 0 if into is None else into, 0 if back else index, index if back else 0]
            fields += [x.stride(0), *rows.stride()[:3], 0 if into is None else into.stride(0)]
            fields += [x.shape[0], rows.shape[0] * n, blocks, heads, heads // rows.shape[1], n, units, scale, turns]
            blocks += -(-(x.shape[0] if back else rows.shape[0] * n) // units)
        empty = 3 - len(parts)
        layout += ("Q" * 5 + "q" * 8 + "i" * 4 + "f?") * empty + "QQii"
        fields += [0] * (19 * empty) + [0 if cos is None else cos, 0 if sin is None else sin, len(parts), size // 2]
        if blocks:
            name = f"place_heads_kernelI{mangled(x.dtype)}Li{width}ELb{int(back)}E"
            args = [Struct(layout, *fields)]
            self.stats.append(self.module.launch(name, blocks, 256, args, shared=shared, **self.options))

    def place_heads(self, query, key, value, cos, sin, slots, places, keys, values, scale):
        from ptxsim import poison

        (b, q), s, (_, heads, size), groups = slots.shape, places.shape[1], query.shape, key.shape[1]
        rows = heads // groups * q
        out = [poison(torch.empty(b, groups, n, size, dtype=query.dtype)) for n in (rows, s, s)]
        parts = [(query, out[0], slots, None, q, scale, True), (key, out[1], places, keys, s, 1.0, True)]
        self.launch([*parts, (value, out[2], places, values, s, 1.0, False)], cos, sin, False)
        return out

    def place_heads_backward(self, grad_query, grad_key, grad_value, cos, sin, slot, place, times, scale):
        from ptxsim import poison

        k, groups, s, size = len(slot), *grad_key.shape[1:]
        shapes = [(k, n, size) for n in (groups * times, groups, groups)]
        out = [poison(torch.empty(shape, dtype=grad_key.dtype)) for shape in shapes]
        parts = [(out[0], grad_query, slot, None, grad_query.shape[2] // times, scale, True)]
        parts += [(out[1], grad_key, place, None, s, 1.0, True), (out[2], grad_value, place, None, s, 1.0, False)]
        self.launch(parts, cos, sin, True)
        return out

    def take_heads(self, rows, slot, times):
        from ptxsim import poison

        out = poison(torch.empty(len(slot), rows.shape[1] * times, rows.shape[3], dtype=rows.dtype))
        self.launch([(out, rows, slot, None, rows.shape[2] // times, 1.0, False)], None, None, True)
        return out

    def take_heads_backward(self, grad, slots, times):
        from ptxsim import poison

        (b, q), (_, heads, size) = slots.shape, grad.shape
        out = poison(torch.empty(b, times * q, heads // times, size, dtype=grad.dtype)).transpose(1, 2)
        self.launch([(grad, out, slots, None, q, 1.0, False)], None, None, False)
        return out


@pytest.fixture(scope="module")
def compiled_emulator():
    return Emulator()


@pytest.fixture
def emulator(compiled_emulator):
    compiled_emulator.options, compiled_emulator.stats = {}, []
    return compiled_emulator


@emulated
class TestEmulatedCuda:
    """Right answers, no race, nothing out of bounds or uninitialised."""

    @DTYPE
    def test_answers(self, emulator, dtype):
        for shape in SHAPES:
            check(emulator.body, shape, dtype)

    @pytest.mark.parametrize("size", [64, 34])
    def test_tokens_apart_are_read_in_place(self, emulator, size):
        check(emulator.body, (5, 1, 8, 9, 3, 2, size), torch.float16, layout=tokens_apart)

    def test_the_same_bits_in_any_order_of_blocks_and_warps(self, emulator):
        args, scale, grads = inputs_of((41, 3, 16, 40, 3, 3, 64), torch.bfloat16)
        results = []
        for emulator.options in ({}, {"seed": 1, "switch_every": 3}, {"lockstep": "warp", "uninit_shared": True}):
            placed = emulator.place_heads(*args[:5], *args[7:], scale)
            results.append([*placed, *emulator.place_heads_backward(*grads, *args[3:7], 3, scale)])
        assert bits_equal(results[0], results[1])
        assert bits_equal(results[0], results[2])

    def test_an_index_out_of_range_is_nobody(self, emulator):
        args, scale, grads = inputs_of((3, 1, 4, 5, 1, 2, 16), torch.float32)
        args[7][0, 0], args[5][0] = 3, 4
        assert not emulator.place_heads(*args[:5], *args[7:], scale)[0][0, 0, [0, 4]].any()
        assert not emulator.place_heads_backward(*grads, *args[3:7], 2, scale)[0][0].any()

    @pytest.mark.parametrize(("groups", "times", "size"), [(3, 3, 64), (8, 4, 128)])
    def test_bytes_moved_are_what_they_must_be(self, emulator, groups, times, size):
        k, b, q, s = 96, 2, 64, 96
        args, scale, grads = inputs_of((k, b, q, s, groups, times, size), torch.float16)
        heads, angles = groups * times, k * size * 4  # of the queries, and again of the keys
        tokens = k * (heads + 2 * groups) * 2 * size
        emulator.place_heads(*args[:5], *args[7:], scale)
        kept, written = (b * s - k) * 2 * groups * 2 * size, b * (q * heads + 2 * s * groups) * 2 * size
        maps = 4 * b * (q + 2 * s)
        assert moved(emulator.stats[-1]) <= 1.05 * (tokens + 2 * angles + kept + written + maps)
        emulator.place_heads_backward(*grads, *args[3:7], times, scale)
        assert moved(emulator.stats[-1]) <= 1.05 * (2 * tokens + 2 * angles + 3 * 8 * k)
        emulator.take_heads(grads[0], args[5], times)
        assert moved(emulator.stats[-1]) <= 1.05 * (2 * k * heads * 2 * size + 8 * k)
        emulator.take_heads_backward(args[0], args[7], times)
        assert moved(emulator.stats[-1]) <= 1.05 * ((k + b * q) * heads * 2 * size + 4 * b * q)
        assert len(emulator.stats) == 4


# --- attention of a second look ---------------------------------------------------------------------------------------

# Of whole rows, and in blocks of queries.
PRETEND = """
import json, pretend_gpu
pretend_gpu.install("gpu", card="t4", poison=True)
import test_rotate_kernels as cases
from cascade_fast.stages import gpu_attention
from test_launches import as_on_a_card

as_on_a_card()
found = []
for everyone, mask_bytes in ((False, 2**20), (True, 2**20), (False, 1)):
    gpu_attention.MASK_BYTES = mask_bytes
    found.append(cases.attention_beside_the_cpu(everyone))
print(json.dumps(found))
"""


@needs_pretend_gpu
def test_attention_on_a_pretend_card():
    for calls, off in on_pretend_card(PRETEND):
        # What was attended to, and the keys that are left.
        taken = {"take_heads": 2, "take_heads_backward": 2}
        assert calls == {"place_heads": 1, "place_heads_backward": 1, **taken}
        assert off < 1e-5


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@DTYPE
def test_gpu_answers(dtype):
    device = cuda_card("place_heads")
    for shape in [*SHAPES, (900, 4, 256, 512, 3, 3, 64), (300, 2, 160, 300, 8, 4, 128)]:
        check(lambda op: backends.body(op, device, "cuda"), shape, dtype, device)
    check(lambda op: backends.body(op, device, "cuda"), (5, 1, 8, 9, 3, 2, 34), dtype, device, tokens_apart)


@pytest.mark.gpu
def test_gpu_opcheck():
    check_op(cuda_card("place_heads"), "cuda")
