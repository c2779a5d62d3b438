"""The GPU kernels of a layer's operators, norms and the gated MLP's product: CUDA C++ and Triton emulated, Triton
interpreted, and (``-m gpu``) both on a card. That they compile for every card: test_cuda_kernels, test_triton_kernels.

Shape legend: N rows, D hidden or intermediate size, P parts of a weight's gradient.
"""

import os

import pytest
import torch
from cuda_cases import (
    DTYPES,
    compile_headers,
    cuda_card,
    emulated,
    mangled,
    moved,
    randn,
    wide,
)
from layer_kernel_cases import LAYOUTS, check_all, check_non_finite
from layer_op_cases import EPS, bits_equal, norm_inputs

from cascade_fast import ops
from cascade_fast.ops import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
SHAPES = [(0, 8), (1, 1), (3, 7), (9, 64), (5, 576), (3, 577), (2, 4096)]
LONG = [(3, 2051), (2, 8200)]  # rows that a program does not hold: of CUDA in elements, of both in 16-byte words
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
NATIVE = torch.ops.cascade_fast


# --- CUDA C++, emulated -----------------------------------------------------------------------------------------------


class Emulator:
    """The launchers of rms_norm.cu and silu_mul.cu over again, for the emulator. Outputs start poisoned.

    Attributes:
        options: of the launches.
        teams: of a norm's kernel, at most; None: as the launcher has it.
        stats: of all launches.
    """

    def __init__(self):
        lines = []
        for dtype, t in DTYPES.items():
            bits, read, f = f"{t}::Bits*", f"const {t}::Bits*", "const float*"
            for count in (4, 1):
                for add in ("false", "true"):
                    lines.append(
                        f"template __global__ void rms_norm_kernel<{t}, {count}, {add}>(const uint32_t*, int64_t,"
                        f" {read}, int64_t, const uint32_t*, uint32_t*, {bits}, float*, int64_t, int, float, int);"
                    )
                for flags in ("false, false", "false, true", "true, false", "true, true"):
                    lines.append(
                        f"template __global__ void rms_norm_backward_kernel<{t}, {count}, {flags}>({read}, int64_t,"
                        f" const uint32_t*, int64_t, const uint32_t*, {f}, const uint32_t*, int64_t, uint32_t*, {bits},"
                        " uint32_t*, int64_t, int, int);"
                    )
            for width in (16, dtype.itemsize):
                for body in ("SiluMul", "SiluMulGrad"):
                    args = f"{t}, {width}, {body}"
                    lines.append(f"template __global__ void silu_mul_kernel<{args}>(SiluRows<{t}, {body}>);")
        self.module = compile_headers(("rms_norm", "silu_mul"), lines)
        self.options, self.teams, self.stats = {}, None, []

    def body(self, op):
        return getattr(self, op)

    def launch(self, kernel, blocks, threads, args):
        self.stats.append(self.module.launch(kernel, blocks, threads, args, **self.options))

    def norm(self, kernel, dtype, flags, matrices, args, most):
        """Launches a norm's kernel; ``args`` without the last, the team's size. Returns how many teams have rows."""
        rows, dim = matrices[0].shape
        count = 4 if dim % 4 == 0 and wide(*matrices) else 1
        team = 32 * min(max(-(-(dim // count) // (32 * 4)), 1), 16)  # norm_team
        threads = 256 if team == 32 else team
        blocks = -(-min(rows, self.teams or most) // (threads // team))
        name = f"{kernel}I{mangled(dtype)}Li{count}E" + "".join(f"Lb{int(flag)}E" for flag in flags)
        self.launch(name, blocks, threads, [*args, team])
        return min(rows, blocks * (threads // team))

    def rms_norm(self, x_ND, weight_D, eps, dtype, added_ND=None):
        from ptxsim import poison

        n, d = x_ND.shape
        add = added_ND is not None
        out_ND, inv_rms_N = poison(torch.empty(n, d, dtype=dtype)), poison(torch.empty(n))
        sum_ND = poison(torch.empty(n, d)) if add else None
        args = [x_ND, x_ND.stride(0), added_ND, added_ND.stride(0) if add else 0, weight_D, sum_ND, out_ND, inv_rms_N]
        matrices = [x_ND, out_ND, *([added_ND, sum_ND] if add else [])]
        if n:
            self.norm("rms_norm_kernel", dtype, [add], matrices, [*args, n, d, eps], n)
        return (sum_ND, out_ND, inv_rms_N) if add else (out_ND, inv_rms_N)

    def add_rms_norm(self, x_ND, added_ND, weight_D, eps):
        return self.rms_norm(x_ND, weight_D, eps, added_ND.dtype, added_ND)

    def rms_norm_backward(self, grad_ND, x_ND, weight_D, inv_rms_N, weight_grad, grad_sum_ND=None):
        from ptxsim import poison

        (n, d), add = x_ND.shape, grad_sum_ND is not None
        grad_x_ND = poison(torch.empty(n, d))
        grad_added_ND = poison(torch.empty(n, d, dtype=grad_ND.dtype)) if add else None
        most = min(512, -(-n // 4)) if weight_grad else n
        parts_PD = poison(torch.empty(min(n, most + 7), d)) if weight_grad else None
        grad_weight_D = poison(torch.empty(d if weight_grad else 0))
        args = [grad_ND, grad_ND.stride(0), x_ND, x_ND.stride(0), weight_D, inv_rms_N, grad_sum_ND]
        args += [grad_sum_ND.stride(0) if add else 0, grad_x_ND, grad_added_ND, parts_PD, n, d]
        matrices, parts = [x_ND, grad_ND, grad_x_ND, *([grad_sum_ND, grad_added_ND] if add else [])], 0
        if n:
            parts = self.norm("rms_norm_backward_kernel", grad_ND.dtype, [add, weight_grad], matrices, args, most)
        if weight_grad:
            self.launch("rms_norm_sum_parts_kernel", -(-d // 32), 512, [parts_PD, grad_weight_D, parts, d])
        return (grad_x_ND, grad_added_ND, grad_weight_D) if add else (grad_x_ND, grad_weight_D)

    def add_rms_norm_backward(self, grad_sum_ND, grad_ND, sum_ND, weight_D, inv_rms_N, weight_grad):
        return self.rms_norm_backward(grad_ND, sum_ND, weight_D, inv_rms_N, weight_grad, grad_sum_ND)

    def silu_mul(self, *inputs):
        from ptxsim import Struct, poison

        (n, d), dtype, size = inputs[0].shape, inputs[0].dtype, inputs[0].element_size()
        outputs = [poison(torch.empty(n, d, dtype=dtype)) for _ in inputs[1:]]
        flat = all(m.stride(0) == d for m in inputs)
        begins = all(m.storage_offset() * size % 16 == 0 for m in inputs)
        width = 16 if (begins if flat else wide(*inputs, *outputs)) else size
        rows, dim = (1, n * d) if flat else (n, d)
        blocks = max(1, -(-(dim * size // width) // 512))
        fields = [*inputs, *(m.stride(0) for m in inputs), *outputs, dim, blocks]
        layout = "Q" * len(inputs) + "q" * len(inputs) + "Q" * len(outputs) + "qq"
        name = f"silu_mul_kernelI{mangled(dtype)}Li{width}ENS_{['7SiluMul', '11SiluMulGrad'][len(inputs) - 2]}E"
        if n:
            self.launch(name, rows * blocks, 256, [Struct(layout, *fields)])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    silu_mul_backward = silu_mul


@pytest.fixture(scope="module")
def compiled_emulator():
    return Emulator()


@pytest.fixture
def emulator(compiled_emulator):
    compiled_emulator.options, compiled_emulator.teams, compiled_emulator.stats = {}, None, []
    return compiled_emulator


@emulated
class TestEmulatedCuda:
    """Right answers, no race, nothing out of bounds or uninitialised."""

    __test__ = not INTERPRETED

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @DTYPE
    def test_answers(self, emulator, dtype, shape):
        check_all(emulator.body, shape, dtype)

    @pytest.mark.parametrize("shape", LONG, ids=str)
    def test_long_rows_are_read_in_parts(self, emulator, shape):
        emulator.teams = 1  # which takes all rows
        check_all(emulator.body, shape, torch.float16)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strided_rows_are_read_in_place(self, emulator, layout):
        shape, place = LAYOUTS[layout]
        check_all(emulator.body, shape, torch.float16, place)

    @pytest.mark.parametrize("options", [{"seed": 1, "switch_every": 3}, {"schedule": "reverse"}], ids=str)
    def test_the_same_bits_in_any_order_of_blocks(self, emulator, options):
        x, _, weight, (_, grad) = norm_inputs(37, 132, torch.bfloat16)
        results = []
        for emulator.options in ({}, options):
            out, inv_rms = emulator.rms_norm(x, weight, EPS, torch.bfloat16)
            results.append((out, *emulator.add_rms_norm_backward(x, grad, x, weight, inv_rms, True)))
        assert bits_equal(*results)

    def test_warps_at_different_paces(self, emulator):
        emulator.options, emulator.teams = {"lockstep": "warp", "uninit_shared": True}, 2
        check_all(emulator.body, (7, 600), torch.float16)

    def test_non_finite_rows(self, emulator):
        check_non_finite(emulator.body)

    @pytest.mark.parametrize("d", [576, 4096])
    def test_bytes_moved_are_what_they_must_be(self, emulator, d):
        """With one team: others read the weight, too, and leave a part of its gradient each, from and in the cache."""
        n, (x, added, weight, grads) = 96, norm_inputs(96, d, torch.float16)
        emulator.teams = 1
        inv_rms, gates = torch.ones(n), [randn(n, d, dtype=torch.float16, seed=i) for i in range(3)]
        calls = {  # bytes of each element, read and written
            "rms_norm": ((x, weight, EPS, torch.float16), 4 + 2),
            "add_rms_norm": ((x, added, weight, EPS), 4 + 2 + 4 + 2),
            "rms_norm_backward": ((grads[1], x, weight, inv_rms, True), 2 + 4 + 4),
            "add_rms_norm_backward": ((*grads, x, weight, inv_rms, True), 4 + 2 + 4 + 4 + 2),
            "silu_mul": (gates[:2], 2 + 2 + 2),
            "silu_mul_backward": (gates, 3 * 2 + 2 * 2),
        }
        for op, (args, size) in calls.items():
            emulator.stats.clear()
            emulator.body(op)(*args)
            assert len(emulator.stats) == (2 if "norm_backward" in op else 1)
            assert moved(*emulator.stats) <= 1.05 * n * d * size, op
            assert emulator.stats[0].loads.efficiency > 0.95, op


# --- Triton -----------------------------------------------------------------------------------------------------------


def launcher(op):
    return pytest.importorskip("cascade_kernels.launchers").LAUNCHERS[op]


class TestInterpretedTriton:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("shape", [*SHAPES, LONG[1], (70, 33)], ids=str)
    @DTYPE
    def test_answers(self, dtype, shape):
        check_all(launcher, shape, dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strided_rows_are_read_in_place(self, layout):
        shape, place = LAYOUTS[layout]
        check_all(launcher, shape, torch.float16, place)

    def test_transposed(self):
        check_all(launcher, (21, 12), torch.float32, lambda t: t.t().contiguous().t())

    def test_non_finite_rows(self):
        check_non_finite(launcher)


@pytest.mark.emulated
class TestEmulatedTriton:
    """Compiled for sm_75 and executed, programs interleaved at random, every access checked and counted."""

    __test__ = not INTERPRETED

    @pytest.fixture
    def device(self):
        pytest.importorskip("triton")
        adapter = pytest.importorskip("ptxsim.triton_device", reason="the optional module ptxsim is not on PYTHONPATH")
        return lambda **options: adapter.emulated(capability=75, poison_empty=True, **options)

    @pytest.mark.parametrize(
        ("dtype", "shape"), [(torch.bfloat16, (9, 7)), (torch.float16, (5, 576)), (torch.float16, (2, 8200))], ids=str
    )
    def test_answers(self, device, dtype, shape, monkeypatch):
        module = pytest.importorskip("cascade_kernels.rms_norm")
        monkeypatch.setattr(module, "PARTS", 2)
        monkeypatch.setattr(module, "PROGRAMS", 2)
        with device(seed=1, switch_every=3):
            check_all(launcher, shape, dtype)

    @pytest.mark.parametrize("d", [576, 4096])
    def test_traffic(self, device, d, monkeypatch):
        module = pytest.importorskip("cascade_kernels.rms_norm")
        monkeypatch.setattr(module, "PARTS", 1)
        monkeypatch.setattr(module, "PROGRAMS", 1)
        n, (x, added, weight, grads) = 96, norm_inputs(96, d, torch.float16)
        gate = x.half()
        with device() as record:
            launcher("add_rms_norm")(x, added, weight, EPS)
            launcher("rms_norm")(x, weight, EPS, torch.float16)
            launcher("add_rms_norm_backward")(*grads, x, weight, torch.ones(n), True)
            launcher("rms_norm_backward")(grads[1], x, weight, torch.ones(n), True)
            launcher("silu_mul")(gate, added)
            launcher("silu_mul_backward")(grads[1], gate, added)
        sizes = [12, 6, 16, 0, 10, 0, 6, 10]  # bytes of each element, read and written
        assert len(record.launches) == len(sizes)
        for launch, size in zip(record.launches, sizes, strict=True):
            assert launch.moved_bytes <= 1.05 * n * d * size + (12 * d if size == 0 else 0), launch.summary()


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def card(request):
    """The device, and a backend's name."""
    if request.param == "cuda":
        return cuda_card("rms_norm"), "cuda"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device()), "triton"


def layer(x, added, weight, backend):
    """Norms and product as a stage's layer calls them; gradients of all."""
    total, normed = ops.add_rms_norm(x, added, weight, EPS, backend=backend)
    gated = ops.silu_mul(normed, added, backend=backend)
    return total, ops.rms_norm(total + gated.float(), weight, EPS, dtype=added.dtype, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LONG, (5000, 576), (70_000, 64)], ids=str)
@DTYPE
def test_gpu_answers(card, dtype, shape):
    device, backend = card
    check_all(lambda op: backends.body(op, device, backend), shape, dtype, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_layouts(card, layout):
    device, backend = card
    shape, place = LAYOUTS[layout]
    check_all(lambda op: backends.body(op, device, backend), shape, torch.float16, place, device=device)


@pytest.mark.gpu
def test_gpu_opcheck(card):
    device, backend = card
    x, added, weight, (grad_sum, grad) = norm_inputs(12, 40, torch.float16)
    x, added, weight, grad_sum, grad = (t.to(device) for t in (x, added, weight, grad_sum, grad))
    inv_rms, to = torch.rsqrt(x.square().mean(-1) + EPS), {"backend": backend}
    wanting = [t.clone().requires_grad_() for t in (x, added, weight)]
    check = torch.library.opcheck
    check(NATIVE.rms_norm.default, (wanting[0], wanting[2], EPS), to | {"dtype": torch.float16})
    check(NATIVE.rms_norm_backward.default, (grad, x, weight, inv_rms), to)
    check(NATIVE.add_rms_norm.default, (*wanting[:2], weight, EPS), to)
    check(NATIVE.add_rms_norm_backward.default, (grad_sum, grad, x, weight, inv_rms), to)
    check(NATIVE.silu_mul.default, (wanting[1], grad), to)
    check(NATIVE.silu_mul_backward.default, (grad, added, added), to)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["again", "compile", "graph"])
def test_gpu_step(card, how):
    """Forward and backward: the same bits again, compiled, and captured in a CUDA graph, where nothing may wait."""
    device, backend = card
    x, added, weight, grads = norm_inputs(3000, 576, torch.float16)
    inputs = [t.to(device).requires_grad_() for t in (x, added, weight)]
    grads = [t.to(device) for t in grads]

    def step(run=layer):
        outputs = run(*inputs, backend)
        return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, inputs, grads))]

    want = step()
    if how == "compile":
        for got, wanted in zip(step(torch.compile(layer, fullgraph=True)), want, strict=True):
            torch.testing.assert_close(got, wanted)
        return
    if how == "graph":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
    else:
        got = step()
    torch.cuda.synchronize()
    assert bits_equal([t.cpu() for t in got], [t.cpu() for t in want])
