"""What this machine's GPU does, all in one run: ``make bench-gpu``, or ``python -m benchmarks.gpu [--json FILE]``.

Prints tables and appends one JSON line to ``benchmarks/results/gpu.jsonl``, or to FILE:

- *copies* and *products*: what the card itself does.
- *selection*, *loss*, *optimizer*: operators, with the bytes that they must move at least over their time, beside the
  card's peak.
- *steps*: the loop of the original experiment (``naive_loop.py``) and a training step of each preset, SmolLM2-135M's
  shapes; *base pass*. With the kernels that they launch and the peak of memory, measured and as the plan has it.

Times are of CUDA events, medians of rounds in which the variants take turns. Answers are checked before the clock runs.
A part that fails is named under ``errors``; the others go on, and the exit status is 1. Without a GPU it is 2.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks import card, common, optimizer_step, selection, workload
from benchmarks.card import GPU, Line
from benchmarks.naive_loop import BATCH_TOKENS, naive_losses, naive_stage
from benchmarks.workload import LAYERS, SEQ_LEN, base_config, check_close, steps_of
from cascade_fast import ops
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.planning.memory import memory_plan
from cascade_fast.runtime.compute import Compute, dtype_name, release_memory
from cascade_fast.settings import make_settings
from cascade_fast.training.optimizers import build_optimizer

PRESETS = ("seed", "warm", "second-look", "lora")


@dataclass(frozen=True)
class Sizes:
    """How much of everything. ``changes``: settings of the presets."""

    rounds: int = 7
    optimizers: tuple[str, ...] = ("adamw", "adamw8bit", "paged_adamw8bit")
    tensors: int | None = None  # of the stage that the optimizers move
    burst: int = 20  # of an operator, in a row between two events; of a step a quarter of that, of a base pass one
    copied: int = 2**28
    rows: int = 131_072
    products: tuple[tuple[int, int, int], ...] = ((4096, 4096, 4096), (512, 576, 1536), (512, 576, 49_152))
    blocks: int = 16
    base_blocks: int = 512
    naive_layers: int = LAYERS
    naive_steps: int = 16
    config: LlamaConfig = field(default_factory=base_config)
    changes: dict[str, Any] = field(default_factory=dict)


def tiny() -> Sizes:
    """Shows in a minute that everything runs; its times say nothing."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500, tie_word_embeddings=True,
    )  # fmt: skip
    changes = {"layers_per_stage": 2, "batch_tokens": 256}
    return Sizes(
        rounds=1, burst=1, copied=2**16, rows=500, products=((64, 64, 64),), optimizers=("adamw", "adamw8bit"),
        tensors=2, blocks=4, base_blocks=4, naive_layers=1, naive_steps=4, config=config, changes=changes,
    )  # fmt: skip


def planned(settings: Any, config: LlamaConfig, compute: Compute) -> dict[str, float]:
    """Bytes of each phase."""
    fused = torch.cuda.get_device_capability() >= (8, 0)
    plan = memory_plan(settings, config, dtype=compute.dtype, on_cpu=False, fused_attention=fused)
    return {phase.name: phase.peak for phase in plan.phases}


# --- parts ------------------------------------------------------------------------------------------------------------


def copies(sizes: Sizes, folder: Path) -> dict[str, Line]:
    pageable = torch.ones(sizes.copied, dtype=torch.uint8)
    pinned, back = pageable.pin_memory(), torch.zeros_like(pageable).pin_memory()
    there, other = (torch.zeros(sizes.copied, dtype=torch.uint8, device=GPU) for _ in range(2))
    variants: dict[str, Callable[[], object]] = {
        "to the card, pinned": lambda: there.copy_(pinned, non_blocking=True),
        "to the card, pageable": lambda: there.copy_(pageable),
        "from the card, pinned": lambda: back.copy_(there, non_blocking=True),
        "on the card": lambda: other.copy_(there),
    }
    for run in variants.values():
        run()
    torch.cuda.synchronize()
    assert other.all(), "a copy has not arrived"
    assert back.all(), "a copy has not come back"
    lines = card.timed(variants, sizes.rounds, sizes.burst)
    for name in variants:
        lines[name]["GB/s"] = (1 + (name == "on the card")) * sizes.copied / lines[name]["seconds"]["p50"] / 1e9
    return lines


def products(sizes: Sizes, folder: Path) -> dict[str, Line]:
    compute = Compute.choose("cuda", "auto")
    lines: dict[str, Line] = {}
    for dtype in dict.fromkeys((compute.dtype, torch.float32)):
        flops, variants = {}, {}
        for m, k, n in sizes.products:
            a, b = (torch.ones(s, device=GPU, dtype=dtype) / 8 for s in ((m, k), (k, n)))
            assert (a @ b == k / 64).all(), "a product of ones and eighths is exact"
            name = f"{m} x {k} x {n}, {dtype_name(dtype)}"
            flops[name], variants[name] = 2.0 * m * k * n, lambda a=a, b=b: a @ b
        lines |= card.timed(variants, sizes.rounds, sizes.burst)
        for name, count in flops.items():
            lines[name]["TFLOP/s"] = count / lines[name]["seconds"]["p50"] / 1e12
    return lines


def selections(sizes: Sizes, folder: Path) -> dict[str, Line]:
    x = selection.make_inputs(sizes.rows, sizes.config.hidden_size, Compute.choose("cuda", "auto").dtype, 0.9, "cuda")
    selection.check(x)
    n, k, row = sizes.rows, x.k, x.h_in_ND[0].nbytes
    moved = {
        "score": n * (2 * row + 4),
        "select": n * 4 + k * 8,
        "gather": k * (2 * row + 8 + 2 * (8 + 8 + 4)),  # index, labels, positions, scores
        "pipeline": n * (2 * row + 8) + k * (2 * row + 16 + 2 * (8 + 8 + 4)),
        "scatter": k * (row + 8) + (n - k) * row + n * row,
        "scatter: clone": 2 * n * row,
    }
    return card.with_bandwidth(card.timed(selection.variants(x), sizes.rounds, sizes.burst), moved)


def loss(sizes: Sizes, folder: Path) -> dict[str, Line]:
    compute, size, vocab = Compute.choose("cuda", "auto"), sizes.config.hidden_size, sizes.config.vocab_size
    hidden_ND = torch.randn(512, size, device=GPU).to(compute.dtype).requires_grad_()
    head_VD = (torch.randn(vocab, size, device=GPU) * 0.02).to(compute.dtype)
    label_N = torch.randint(0, vocab, (512,), device=GPU)
    logits_NV = (hidden_ND @ head_VD.T).detach()

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden_ND @ head_VD.T).float(), label_N)

    def ours() -> torch.Tensor:
        return linear_cross_entropy(hidden_ND, head_VD, label_N, dtype=compute.dtype)

    check_close(float(ours().detach()), float(plain().detach()), compute.dtype)
    variants = {
        "head and cross-entropy, there and back": lambda: ours().backward(),
        "the same in plain torch": lambda: plain().backward(),
        "cross_entropy_ with gradient": lambda: ops.cross_entropy_(logits_NV, label_N, grad=True),
    }
    lines = card.timed(variants, sizes.rounds, sizes.burst)
    return card.with_bandwidth(lines, {"cross_entropy_ with gradient": 2 * logits_NV.nbytes})


def optimizers(sizes: Sizes, folder: Path) -> dict[str, Line]:
    """A step over the stage of ``optimizer_step.py``. Bytes: weights and state there and back, and the gradient."""
    made, moved = {}, {}
    for name in sizes.optimizers:
        parameters, truth = (optimizer_step.make_parameters(device=d)[: sizes.tensors] for d in ("cuda", "cpu"))
        settings = make_settings({"optimizer": name, **optimizer_step.SETTINGS})
        made[name] = build_optimizer(parameters, settings, GPU)
        made[name].step()
        build_optimizer(truth, make_settings(dict(optimizer_step.SETTINGS)), torch.device("cpu")).step()
        for ours, theirs in zip(parameters, truth, strict=True):
            off = (ours.detach().cpu() - theirs.detach()).abs().mean()
            assert off < 0.1 * settings.lr, f"{name} is not AdamW: {off:g} off"
        moved[name] = (28 if name == "adamw" else 16) * sum(p.numel() for p in parameters)
    steps = {name: optimizer.step for name, optimizer in made.items()}
    return card.with_bandwidth(card.timed(steps, sizes.rounds, sizes.burst), moved)


def training_steps(sizes: Sizes, folder: Path) -> dict[str, Line]:
    """Seconds of one step; all steps and the naive loop take turns."""
    stage = naive_stage(sizes.config, sizes.naive_layers).to(GPU)
    size, vocab, count = sizes.config.hidden_size, sizes.config.vocab_size, sizes.naive_steps * BATCH_TOKENS
    hidden_ND, label_N = torch.randn(count, size, device=GPU), torch.randint(0, vocab, (count,), device=GPU)

    def naive_step() -> float:
        events = []

        def order():
            for picked in torch.arange(count, device=GPU).split(BATCH_TOKENS):
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
                yield picked

        naive_losses(stage, hidden_ND, label_N, order())
        torch.cuda.synchronize()
        # The first steps make the optimizer's state; in a long run they do not count.
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[2:]))

    lines: dict[str, Line] = {"naive loop": {"tokens": BATCH_TOKENS}}
    variants: dict[str, Callable[[], float]] = {"naive loop": naive_step}
    for preset in PRESETS:
        before = torch.cuda.memory_allocated()
        trainer = workload.preset_trainer(preset, folder / preset, "cuda", sizes.config, sizes.blocks, **sizes.changes)
        workload.check_trainer(trainer)
        step = steps_of(trainer, 1)
        step()
        lines[preset] = {"tokens": steps_of(trainer, 3)() / 3, **card.counted(step)}
        lines[preset]["peak bytes"] = card.memory_of(steps_of(trainer, 3), before)
        plan = planned(trainer.settings, sizes.config, trainer.compute)["training"]
        lines[preset] |= {"planned": plan, "planned/peak": plan / lines[preset]["peak bytes"]}
        variants[preset] = lambda step=step: card.event_seconds(step, max(1, sizes.burst // 4))
    taken = card.in_turns(variants, sizes.rounds)
    for name, line in lines.items():
        share = line["tokens"] / BATCH_TOKENS
        line |= {"seconds": common.percentiles(taken[name])}
        line |= {"tokens/s": line["tokens"] / line["seconds"]["p50"]}
        line |= {"times naive": common.ratio(taken, "naive loop", name, share)["p50"]}
    return lines


def base_passes(sizes: Sizes, folder: Path) -> dict[str, Line]:
    compute, lines, variants = Compute.choose("cuda", "auto"), dict[str, Line](), dict[str, Callable[[], object]]()
    for criterion in ("entropy", "cosine"):
        before, tokens = torch.cuda.memory_allocated(), sizes.base_blocks * SEQ_LEN
        run = workload.base_pass(folder / criterion, compute, criterion, sizes.config, sizes.base_blocks)
        settings = make_settings({"criterion": criterion, "seq_len": SEQ_LEN, "train_blocks": sizes.base_blocks})
        plan = planned(settings, sizes.config, compute)["base pass"]
        run()
        lines[criterion] = {"tokens": tokens, **card.counted(run), "peak bytes": card.memory_of(run, before)}
        lines[criterion] |= {"planned": plan, "planned/peak": plan / lines[criterion]["peak bytes"]}
        variants[criterion] = run
    for criterion, line in card.timed(variants, sizes.rounds, 1).items():
        lines[criterion] |= {**line, "tokens/s": lines[criterion]["tokens"] / line["seconds"]["p50"]}
    return lines


PARTS: dict[str, Callable[[Sizes, Path], dict[str, Line]]] = {
    "copies": copies,
    "products": products,
    "selection": selections,
    "loss": loss,
    "optimizer": optimizers,
    "steps": training_steps,
    "base pass": base_passes,
}


# --- the run ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    properties, compute = torch.cuda.get_device_properties(0), Compute.choose("cuda", "auto")
    return {
        **common.environment("cuda"),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "peak_bytes_per_second": card.peak_bandwidth(),
        "dtype": compute.dtype_name,
        "served_by": {op: ops.choose(op, GPU) for op in ops.OPS},
    }


def measure(sizes: Sizes) -> dict[str, Any]:
    """One key for each of ``PARTS``, and ``environment``, ``part_seconds``, ``errors``."""
    result: dict[str, Any] = {"environment": environment(), "part_seconds": {}, "errors": {}}
    print("\n".join(f"{name}: {value}" for name, value in result["environment"].items()))
    for title, part in PARTS.items():
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                result[title] = part(sizes, Path(folder))
            card.show(title, result[title])
        except Exception as error:  # of any kind: what the other parts find is worth having
            result[title], result["errors"][title] = None, f"{type(error).__name__}: {error}"
            print(f"\n{title}: FAILED: {result['errors'][title]}", flush=True)
        release_memory()
        result["part_seconds"][title] = round(time.monotonic() - started, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=common.RESULTS / "gpu.jsonl", help="where the line is appended")
    parser.add_argument("--tiny", action="store_true", help="show that everything runs: the times say nothing")
    args = parser.parse_args()
    reason = card.why_no_gpu()
    if reason is not None:
        print(f"benchmarks.gpu: {reason}; it needs an NVIDIA GPU and a CUDA build of PyTorch", file=sys.stderr)
        return 2
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with args.json.open("a") as file:  # before the minutes of work, should that not be possible
        result = measure(tiny() if args.tiny else Sizes())
        file.write(json.dumps(result) + "\n")
    print(f"\none line written to {args.json}" + "".join(f"\nFAILED: {name}" for name in result["errors"]))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
