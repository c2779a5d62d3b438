"""Every launcher by the name of its operator, and every kernel variant for ahead-of-time compilation.

``LAUNCHERS[op]`` takes and returns what the plain torch body of ``op`` does. ``AOT`` lists the variants a run on a
GPU compiles: D and the row strides divisible by 16, pointers aligned, one entry a dtype. Compile one with::

    source = triton.compiler.ASTSource(e["kernel"], e["signature"], e["constexprs"], e["attrs"])
    triton.compile(source, target=GPUTarget("cuda", 75, 32), options={"num_warps": e["num_warps"]})
"""

from collections.abc import Callable
from typing import Any

from . import cosine_score, cross_entropy, gather_rows, rms_norm, rotate_rows, scatter_rows, select_hard, silu_mul
from .common import tile_shape

LAUNCHERS: dict[str, Callable] = {
    "cosine_score": cosine_score.cosine_score,
    "select_hard": select_hard.select_hard,
    "gather_rows": gather_rows.gather_rows,
    "scatter_rows": scatter_rows.scatter_rows,
    "cross_entropy_": cross_entropy.cross_entropy_,
    "rms_norm": rms_norm.rms_norm,
    "rms_norm_backward": rms_norm.rms_norm_backward,
    "add_rms_norm": rms_norm.add_rms_norm,
    "add_rms_norm_backward": rms_norm.add_rms_norm_backward,
    "silu_mul": silu_mul.silu_mul,
    "silu_mul_backward": silu_mul.silu_mul_backward,
    "rotate_rows": rotate_rows.rotate_rows,
    "rotate_rows_backward": rotate_rows.rotate_rows_backward,
}

SIZE_OF = {"fp32": 4, "fp16": 2, "bf16": 2, "i32": 4, "i16": 2}
AOT_WIDTHS = (576, 4096)  # hidden sizes whose tiles differ


def _entry(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], num_warps: int, aligned: str = ""
) -> dict[str, Any]:
    """One variant; ``aligned`` names the integers divisible by 16. Pointers always are."""
    names = kernel.arg_names
    signature = {arg: "constexpr" if arg in constexprs else types.get(arg, "i32") for arg in names}
    sixteen = [arg for arg in names if signature[arg].startswith("*") or arg in aligned.split()]
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": {(names.index(arg),): [["tt.divisibility", 16]] for arg in sixteen},
        "num_warps": num_warps,
    }


def _cosine_score_entries() -> list[dict[str, Any]]:
    entries = []
    for dtype in ("fp32", "fp16", "bf16"):
        for d in AOT_WIDTHS:
            bn, bd = tile_shape(d, SIZE_OF[dtype])
            types = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "score_ptr": "*fp32"}
            sizes = {"EPS": cosine_score.EPS, "BN": bn, "BD": bd}
            kernel = cosine_score._cosine_score_kernel
            entries.append(_entry(f"cosine_score-{dtype}-BD{bd}", kernel, types, sizes, 4, "D stride_a stride_b"))
    return entries


def _select_hard_entries() -> list[dict[str, Any]]:
    s = select_hard
    common = {"BLOCK": s.BLOCK, "BINS": s.BINS, "STATE": s.STATE}
    types = dict.fromkeys(("hist_ptr", "state_ptr", "chunks_ptr", "candidates_ptr"), "*i32")
    types |= {"scores_ptr": "*fp32", "index_ptr": "*i64", "bounds_ptr": "*fp32"}
    histogram = {**common, "SAMPLE": s.SAMPLE, "MARGIN": s.MARGIN}
    narrow, compact = {**common, "GROUP": s.GROUP}, {**common, "CHUNKS": s.MAX_CHUNKS}
    return [
        _entry("select_hard-histogram", s._select_hard_histogram_kernel, types, histogram, s.NUM_WARPS),
        _entry("select_hard-narrow", s._select_hard_narrow_kernel, types, narrow, s.NUM_WARPS),
        _entry("select_hard-compact", s._select_hard_compact_kernel, types, compact, s.NUM_WARPS),
    ]


def _gather_rows_entries() -> list[dict[str, Any]]:
    entries = []
    for dtype in ("i32", "i16"):
        for d in AOT_WIDTHS:
            bk, bd = tile_shape(d, SIZE_OF[dtype])
            for carried in (0, 2):
                types = {"hidden_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "index_ptr": "*i64"}
                types |= {f"{side}{i}_ptr": "*i64" for side in "co" for i in range(gather_rows.CARRIED)}
                sizes = {"CARRIED": carried, "BK": bk, "BD": bd, "stride_index": 1}
                sizes |= {f"stride_c{i}": 1 for i in range(gather_rows.CARRIED)}
                name = f"gather_rows-{dtype}-BD{bd}-carried{carried}"
                kernel = gather_rows._gather_rows_kernel
                entries.append(_entry(name, kernel, types, sizes, 4, "D stride_hidden"))
    return entries


def _scatter_rows_entries() -> list[dict[str, Any]]:
    s = scatter_rows
    index = {"index_ptr": "*i64", "source_ptr": "*i32"}
    invert = {"stride_index": 1, "BK": s.INVERT_BLOCK}
    entries = [_entry("scatter_rows-invert", s._scatter_rows_invert_kernel, index, invert, 4)]
    for dtype in ("i32", "i16", "fp32", "fp16", "bf16"):
        for d in AOT_WIDTHS:
            bn, bd = tile_shape(d, SIZE_OF[dtype])
            types = {**index, **dict.fromkeys(("rows_ptr", "into_ptr", "out_ptr"), f"*{dtype}")}
            add = dtype not in ("i32", "i16")  # a replacement copies integers
            what = f"{'add-' if add else ''}{dtype}-BD{bd}"
            aligned = "D stride_rows stride_into"
            merge, put = {"ADD": add, "BN": bn, "BD": bd}, {"ADD": add, "BK": bn, "BD": bd, "stride_index": 1}
            entries.append(_entry(f"scatter_rows-merge-{what}", s._scatter_rows_merge_kernel, types, merge, 4, aligned))
            entries.append(_entry(f"scatter_rows-put-{what}", s._scatter_rows_put_kernel, types, put, 4, aligned))
    return entries


def _cross_entropy_entries() -> list[dict[str, Any]]:
    entries = []
    for dtype in ("fp32", "fp16", "bf16"):
        for grad in (False, True):
            types = {"logits_ptr": f"*{dtype}", "label_ptr": "*i64", "loss_ptr": "*fp32", "entropy_ptr": "*fp32"}
            sizes = {"stride_label": 1, "GRAD": grad, "BV": cross_entropy.TILE_BYTES // SIZE_OF[dtype]}
            name, kernel = f"cross_entropy_-{dtype}{'-grad' * grad}", cross_entropy._cross_entropy_kernel
            entries.append(_entry(name, kernel, types | {"scale": "fp32"}, sizes, cross_entropy.NUM_WARPS, "V"))
    return entries


def _rms_norm_entries() -> list[dict[str, Any]]:
    r = rms_norm
    names = ("x", "weight", "sum", "inv_rms", "grad_sum", "grad_x", "parts", "grad_weight")
    floats, sizes = {f"{name}_ptr": "*fp32" for name in names}, {"BP": r.SUM_BP, "BD": r.SUM_BD}
    entries = [_entry("rms_norm_backward-sum", r._rms_norm_sum_parts_kernel, floats, sizes, 4, "D")]
    for dtype in ("fp32", "fp16", "bf16"):
        types = floats | {f"{name}_ptr": f"*{dtype}" for name in ("added", "out", "grad", "grad_added")}
        types |= {"eps": "fp32"}
        for d in (*AOT_WIDTHS, 2 * r.MAX_HELD):
            bn, bd, warps = r.norm_tile(d)
            tile, aligned = {"HELD": d <= bd, "BN": bn, "BD": bd}, "D stride_x stride_added stride_grad stride_sum"
            what = f"{dtype}-BD{bd}{'' if d <= bd else '-parts'}"
            for add in (False, True):
                name, sizes = "add_rms_norm" if add else "rms_norm", {"ADD": add, **tile}
                entries.append(_entry(f"{name}-{what}", r._rms_norm_kernel, types, sizes, warps, aligned))
                for weight in (False, True):
                    sizes = {"ADD": add, "WEIGHT": weight, **tile}
                    called = f"{name}_backward-{what}{'-weight' if weight else ''}"
                    entries.append(_entry(called, r._rms_norm_backward_kernel, types, sizes, warps, aligned))
    return entries


def _silu_mul_entries() -> list[dict[str, Any]]:
    s, entries, aligned = silu_mul, [], "F stride_grad stride_gate stride_up"
    kernels = {"silu_mul": s._silu_mul_kernel, "silu_mul_backward": s._silu_mul_backward_kernel}
    for dtype in ("fp32", "fp16", "bf16"):
        for name, kernel in kernels.items():
            types = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.endswith("_ptr")}
            entries.append(_entry(f"{name}-{dtype}", kernel, types, {"BLOCK": s.BLOCK}, 4, aligned))
    return entries


def _rotate_rows_entries() -> list[dict[str, Any]]:
    entries = []
    for dtype in ("fp32", "fp16", "bf16", "i32", "i16"):
        for heads, half in ((9, 32), (32, 64)):
            bh, bf = rotate_rows.head_tile(heads, half)
            types = {"x_ptr": f"*{dtype}", "rows_ptr": f"*{dtype}", "index_ptr": "*i64"}
            types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
            for back in (False, True):
                sizes = {"TURN": dtype[0] != "i", "BACK": back, "BH": bh, "BF": bf}  # a move copies integers
                name = f"rotate_rows{'_backward' * back}-{dtype}-BH{bh}-BF{bf}"
                entries.append(_entry(name, rotate_rows._rotate_rows_kernel, types, sizes, 1, "F stride_x"))
    return entries


AOT: list[dict[str, Any]] = [
    *_cosine_score_entries(),
    *_select_hard_entries(),
    *_gather_rows_entries(),
    *_scatter_rows_entries(),
    *_cross_entropy_entries(),
    *_rms_norm_entries(),
    *_silu_mul_entries(),
    *_rotate_rows_entries(),
]
