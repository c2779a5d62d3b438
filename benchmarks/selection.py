"""Score, select, gather and scatter against plain torch: ``python -m benchmarks.selection --json FILE``.

What is compared, all in one run on the same inputs, checked to give the same answers first:

- *pipeline*: score every token, select the hardest ``--hard-ratio`` of them, gather their rows, labels, positions and
  scores. Against *eager* (normalise both, multiply, sum; ``torch.quantile``; mask; boolean indexing) and *topk*
  (``F.cosine_similarity``, ``torch.topk``, sort, ``index_select``). Both in float32, as the scores must be; *topk in
  bf16* also as it comes, with scores too coarse to give the same selection, and therefore in no ratio.
- *score* against a plain read of the same bytes: the fastest of several reductions of torch.
- *scatter* against ``Tensor.clone`` (like it, a fresh output) and against ``copy_`` into memory that is there already.

Shape legend: N rows (tokens), D hidden size, K selected rows.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks import operator_inputs as cases
from cascade_fast import ops
from cascade_fast.selection import hard_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Selected = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden (K, D); labels, positions, scores (K,)


@dataclass(frozen=True)
class Inputs:
    h_in_ND: Tensor
    h_out_ND: Tensor
    labels_N: Tensor
    positions_N: Tensor
    hard_ratio: float

    @property
    def k(self) -> int:
        return hard_count(self.hard_ratio, self.h_in_ND.shape[0])


def make_inputs(n: int, d: int, dtype: torch.dtype, hard_ratio: float, device: str = "cpu") -> Inputs:
    """Made in pieces, so that 10 million tokens need no float32 copy of themselves."""
    piece = 1 << 17
    h_in_ND, h_out_ND = (torch.empty(n, d, dtype=dtype, device=device) for _ in range(2))
    for start in range(0, n, piece):
        stop = min(n, start + piece)
        h_in_ND[start:stop], h_out_ND[start:stop] = cases.hidden_pair(stop - start, d, dtype, seed=start)
    positions_N = torch.arange(n, device=device)
    return Inputs(h_in_ND, h_out_ND, positions_N * 7 % 50_000, positions_N, hard_ratio)


def fused(x: Inputs, backend: str = "auto") -> Selected:
    scores_N = ops.cosine_score(x.h_in_ND, x.h_out_ND, backend=backend)
    index_K, _ = ops.select_hard(scores_N, x.k, backend=backend)
    hidden_KD, carried = ops.gather_rows(x.h_out_ND, index_K, [x.labels_N, x.positions_N, scores_N], backend=backend)
    return hidden_KD, *carried


def eager(x: Inputs) -> Selected:
    a_ND, b_ND = x.h_in_ND.float(), x.h_out_ND.float()
    a_ND = a_ND / (a_ND.norm(dim=-1, keepdim=True) + 1e-8)
    b_ND = b_ND / (b_ND.norm(dim=-1, keepdim=True) + 1e-8)
    scores_N = (a_ND * b_ND).sum(-1)
    hard_N = scores_N <= torch.quantile(scores_N, x.hard_ratio)
    return x.h_out_ND[hard_N], x.labels_N[hard_N], x.positions_N[hard_N], scores_N[hard_N]


def topk(x: Inputs, in_float32: bool = True) -> Selected:
    pair = (x.h_in_ND, x.h_out_ND)
    scores_N = F.cosine_similarity(*((t.float() for t in pair) if in_float32 else pair), dim=-1)
    index_K = scores_N.topk(x.k, largest=False, sorted=False).indices.sort().values
    return tuple(t.index_select(0, index_K) for t in (x.h_out_ND, x.labels_N, x.positions_N, scores_N))


def check(x: Inputs) -> None:
    """The right answers, or no benchmark."""
    scores_N = ops.cosine_score(x.h_in_ND, x.h_out_ND)
    for start in range(0, len(scores_N), 1 << 16):
        rows = slice(start, start + (1 << 16))
        truth_N = cases.cosine_truth(x.h_in_ND[rows], x.h_out_ND[rows])
        assert (scores_N[rows] - truth_N).abs().max() < 1e-6
    index_K, (kth, following) = ops.select_hard(scores_N, x.k)
    assert torch.equal(index_K.cpu(), cases.select_truth(scores_N.cpu(), x.k)[0])
    ours, carried = fused(x), (x.labels_N, x.positions_N, scores_N)
    assert torch.equal(cases.bits(ours[0]), cases.bits(x.h_out_ND[index_K]))
    assert all(torch.equal(t, full[index_K]) for t, full in zip(ours[1:], carried, strict=True))
    near_N = (scores_N > kth - 1e-6) & (scores_N < following + 1e-6)  # torch's rounding may decide otherwise here
    for other in (eager(x), topk(x)):
        differ_N = torch.zeros_like(near_N)
        differ_N[index_K] = True
        differ_N[other[2]] ^= True
        assert not (differ_N & ~near_N).any()
    scattered_ND = ops.scatter_rows(ours[0], index_K, x.h_in_ND)
    assert torch.equal(scattered_ND[index_K], ours[0])
    scattered_ND[index_K] = x.h_in_ND[index_K]
    assert torch.equal(scattered_ND, x.h_in_ND)


def reads(x: Inputs) -> dict[str, Callable[[], object]]:
    """Plain reads of both arrays, each as fast as torch can: every byte once, next to no output."""
    a, b = x.h_in_ND.flatten(), x.h_out_ND.flatten()
    return {
        "read: sum": lambda: (a.sum(), b.sum()),
        "read: max": lambda: (a.max(), b.max()),
        "read: dot": lambda: torch.dot(a, b),
    }


def variants(x: Inputs) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    scores_N = ops.cosine_score(x.h_in_ND, x.h_out_ND)
    index_K, _ = ops.select_hard(scores_N, x.k)
    rows_KD, _ = ops.gather_rows(x.h_out_ND, index_K)
    existing_ND = torch.zeros_like(x.h_in_ND)
    timed = {
        **reads(x),
        "score": lambda: ops.cosine_score(x.h_in_ND, x.h_out_ND),
        "select": lambda: ops.select_hard(scores_N, x.k),
        "gather": lambda: ops.gather_rows(x.h_out_ND, index_K, [x.labels_N, x.positions_N, scores_N]),
        "pipeline": lambda: fused(x),
        "pipeline: eager": lambda: eager(x),
        "pipeline: topk": lambda: topk(x),
        "scatter": lambda: ops.scatter_rows(rows_KD, index_K, x.h_in_ND),
        "scatter: clone": lambda: x.h_in_ND.clone(),
        "scatter: copy_ into existing memory": lambda: existing_ND.copy_(x.h_in_ND),
        "scatter: index_copy": lambda: x.h_in_ND.index_copy(0, index_K, rows_KD),
    }
    if x.h_in_ND.dtype != torch.float32:
        timed["pipeline: topk in the inputs' dtype (coarse scores)"] = lambda: topk(x, in_float32=False)
    return timed


def measure(x: Inputs, rounds: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """``{"seconds": {variant: percentiles}, "ratios": {name: percentiles}}``."""
    check(x)
    seconds = common.interleaved(variants(x), rounds, device)
    medians = {name: common.percentiles(values)["p50"] for name, values in seconds.items()}
    read = min((name for name in seconds if name.startswith("read")), key=medians.__getitem__)
    ratios = {
        "score_bandwidth_ratio": common.ratio(seconds, read, "score"),
        "pipeline_vs_eager": common.ratio(seconds, "pipeline: eager", "pipeline"),
        "pipeline_vs_topk": common.ratio(seconds, "pipeline: topk", "pipeline"),
        "scatter_bandwidth_ratio": common.ratio(seconds, "scatter: clone", "scatter"),
        "scatter_vs_copy_into_existing": common.ratio(seconds, "scatter: copy_ into existing memory", "scatter"),
    }
    return {"seconds": {name: common.percentiles(values) for name, values in seconds.items()}, "ratios": ratios}


def cost_per_token(device: str, rounds: int, d: int = 64) -> dict[str, list[float]]:
    """Nanoseconds a token of each step from 1e4 to 1e7 tokens (eager up to 1e6: its copies need the memory)."""
    sizes = [10_000, 31_623, 100_000, 316_228, 1_000_000, 3_162_278, 10_000_000]
    steps: dict[str, list[float]] = {name: [] for name in ("score", "select", "gather", "pipeline", "pipeline: eager")}
    for n in sizes:
        x = make_inputs(n, d, torch.bfloat16, 0.9, device)
        timed = variants(x)
        wanted = {name: timed[name] for name in steps if name != "pipeline: eager" or n <= 1_000_000}
        # More rounds where a round is short.
        seconds = common.interleaved(wanted, rounds * max(1, min(10, 300_000 // n)), device)
        for name, values in seconds.items():
            steps[name].append(common.percentiles(values)["p50"] / n * 1e9)
        del x, timed, wanted
    return {"tokens": [float(n) for n in sizes], **steps}


def plot_cost(cost: dict[str, list[float]], path: Path, environment: dict[str, object]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values in cost.items():
        if name != "tokens":
            axes.loglog(cost["tokens"][: len(values)], values, marker="o", label=name)
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    axes.set(xlabel="tokens", ylabel="nanoseconds per token", title=f"bf16, hidden size 64, hard ratio 0.9\n{where}")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the ratios and the environment to this file")
    parser.add_argument(
        "--plot", action="store_true", help="measure 1e4 to 1e7 tokens, draw docs/img/selection_cost.png"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=131_072, help="N (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=576, help="D (default: %(default)s)")
    parser.add_argument(
        "--hard-ratio", type=float, default=0.9, help="share of the tokens selected (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results/selection.jsonl alone")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")

    environment = common.environment(args.device)
    results, details = {}, {}
    for name in args.dtypes:
        x = make_inputs(args.tokens, args.hidden_size, DTYPES[name], args.hard_ratio, args.device)
        measured = measure(x, args.rounds, args.device)
        common.print_table(f"{name} {tuple(x.h_in_ND.shape)}, K = {x.k}", list(measured["seconds"].items()), "ms", 1e3)
        common.print_table(f"{name} ratios", list(measured["ratios"].items()), "times")
        for key, values in measured["ratios"].items():
            results.setdefault(key, {})[name] = round(values["p50"], 3)
        details[name] = measured
        del x
    shape = {"tokens": args.tokens, "hidden_size": args.hidden_size, "hard_ratio": args.hard_ratio}
    result = {**results, "shape": shape, "rounds": args.rounds, "environment": environment, "details": details}
    if args.plot:
        result["nanoseconds_per_token"] = cost = cost_per_token(args.device, max(3, args.rounds // 3))
        plot_cost(cost, common.ROOT / "docs" / "img" / "selection_cost.png", environment)
        print("\nnanoseconds per token, bf16, D = 64")
        for name, values in cost.items():
            print(f"  {name:<20}" + "".join(f"{value:>14,.2f}" for value in values))
    if not args.no_record:
        print(f"\nrecorded in {common.record('selection', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
