"""The GPU kernels of a layer's operators (norms, the gated MLP's product): emulated, interpreted, and on a card.

Shape legend: N rows, D hidden size, F intermediate size, P parts of a weight's gradient.
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
    randn,
    wide,
)
from layer_op_cases import EPS, assert_rounded_once, norm_inputs, strided

from cascade_fast import ops

SHAPES = [(1, 1), (3, 7), (9, 64), (5, 576), (3, 577), (2, 4096)]
LONG = [(2, 8196), (3, 2051)]  # rows that a team cannot hold: in words of 16 bytes, and of an element
HELD = 4


class Emulator:
    """The launchers of rms_norm.cu and silu_mul.cu over again, for the emulator. Outputs start poisoned."""

    def __init__(self):
        lines = []
        for t in DTYPES.values():
            bits, read = f"{t}::Bits", f"const {t}::Bits*"
            for count in (4, 1):
                for add in ("false", "true"):
                    lines.append(
                        f"template __global__ void rms_norm_kernel<{t}, {count}, {add}>(const uint32_t*, int64_t, {read},"
                        f" int64_t, const uint32_t*, uint32_t*, {bits}*, float*, int64_t, int, float, int);"
                    )
                for flags in ("false, false", "false, true", "true, false"):
                    lines.append(
                        f"template __global__ void rms_norm_backward_kernel<{t}, {count}, {flags}>({read}, int64_t,"
                        f" const uint32_t*, int64_t, const uint32_t*, const float*, const uint32_t*, int64_t, uint32_t*,"
                        f" {bits}*, uint32_t*, int64_t, int, int);"
                    )
            for width in (16, torch.finfo(next(d for d, n in DTYPES.items() if n == t)).bits // 8):
                for body in ("SiluMul", "SiluMulGrad"):
                    lines.append(f"template __global__ void silu_mul_kernel<{t}, {width}, {body}>(SiluRows<{t}, {body}>);")
        self.module = compile_headers(("rms_norm", "silu_mul"), lines)

    def norm(self, name, dtype, rows, dim, matrices, args, teams=None, **options):
        """Launches one norm kernel; ``args`` without rows, dim and what follows."""
        count = 4 if dim % 4 == 0 and wide(*matrices) else 1
        team = 32 * min(max(-(-(dim // count) // (32 * HELD)), 1), 16)
        threads = 256 if team == 32 else team
        most = rows if teams is None else teams
        blocks = -(-min(rows, most) // (threads // team))
        kernel = name.format(f"{mangled(dtype)}Li{count}E")
        stats = self.module.launch(kernel, blocks, threads, [*args, rows, dim, *options.pop("after", ()), team], **options)
        return stats, min(rows, blocks * (threads // team))

    def rms_norm(self, x_ND, weight_D, dtype, added_ND=None, **options):
        from ptxsim import poison

        n, d = x_ND.shape
        out_ND, inv_rms_N = poison(torch.empty(n, d, dtype=dtype)), poison(torch.empty(n))
        sum_ND = None if added_ND is None else poison(torch.empty(n, d))
        matrices = [m for m in (x_ND, added_ND, out_ND) if m is not None]
        add = added_ND is not None
        args = [x_ND, x_ND.stride(0), added_ND, added_ND.stride(0) if add else 0, weight_D, sum_ND, out_ND, inv_rms_N]
        name = f"rms_norm_kernelI{{}}Lb{int(add)}E"
        stats, _ = self.norm(name, dtype, n, d, matrices, args, after=[EPS], **options)
        return (*((sum_ND,) if add else ()), out_ND, inv_rms_N), [stats]

    def backward(self, grad_ND, x_ND, weight_D, inv_rms_N, weight_grad=False, grad_sum_ND=None, teams=None, **options):
        from ptxsim import poison

        (n, d), dtype = x_ND.shape, grad_ND.dtype
        grad_x_ND, add = poison(torch.empty(n, d)), grad_sum_ND is not None
        grad_added_ND = poison(torch.empty(n, d, dtype=dtype)) if add else None
        most = teams if teams is not None else min(512, -(-n // 4)) if weight_grad else None
        parts_PD = poison(torch.empty(min(n, (most or 0) + 7), d)) if weight_grad else None
        matrices = [grad_ND, x_ND, grad_x_ND] + ([grad_sum_ND, grad_added_ND] if add else [])
        args = [grad_ND, grad_ND.stride(0), x_ND, x_ND.stride(0), weight_D, inv_rms_N, grad_sum_ND]
        args += [grad_sum_ND.stride(0) if add else 0, grad_x_ND, grad_added_ND, parts_PD]
        name = f"rms_norm_backward_kernelI{{}}Lb{int(add)}ELb{int(weight_grad)}E"
        stats, parts = self.norm(name, dtype, n, d, matrices, args, most, **options)
        if add:
            return (grad_x_ND, grad_added_ND), [stats]
        if not weight_grad:
            return (grad_x_ND,), [stats]
        grad_weight_D = poison(torch.empty(d))
        total = self.module.launch(
            "rms_norm_sum_parts_kernel", -(-d // 32), 512, [parts_PD, grad_weight_D, parts, d], **options
        )
        return (grad_x_ND, grad_weight_D), [stats, total]

    def silu(self, inputs, **options):
        """``silu_mul`` of two inputs, its gradients of three."""
        from ptxsim import Struct, poison

        (n, f), dtype, size = inputs[0].shape, inputs[0].dtype, inputs[0].element_size()
        outputs = [poison(torch.empty(n, f, dtype=dtype)) for _ in inputs[1:]]
        flat = all(m.stride(0) == f for m in inputs)
        width = 16 if (all(m.storage_offset() * size % 16 == 0 for m in inputs) if flat else wide(*inputs, *outputs)) else size
        rows, dim = (1, n * f) if flat else (n, f)
        blocks = max(1, -(-(dim // (width // size)) // 512))
        fields = [*inputs, *(m.stride(0) for m in inputs), *outputs, dim, blocks]
        layout = "Q" * len(inputs) + "q" * len(inputs) + "Q" * len(outputs) + "qq"
        name = f"silu_mul_kernelI{mangled(dtype)}Li{width}ENS_{['7SiluMul', '11SiluMulGrad'][len(inputs) - 2]}E"
        return outputs, [self.module.launch(name, rows * blocks, 256, [Struct(layout, *fields)], **options)]


@pytest.fixture(scope="module")
def emulator():
    return Emulator()
