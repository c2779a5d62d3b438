"""The stage trainer against the loop of the original experiment: ``python -m benchmarks.stage_training [--json FILE]``.

Everything takes turns in one run, on the shapes of SmolLM2-135M (hidden size 576, vocabulary 49,152, stages of 8
layers) with random weights and tokens: speed does not depend on them. The baseline (``naive_loop.py``, and for the base
pass an ``output_hidden_states=True`` pass in float32 with all logits) runs in a process of its own: how a process keeps
freed memory is a setting of the whole process, and ours would make the baseline faster than it is.

- *warm*: hard tokens a second of the default preset, everything included, against the baseline's.
- *MFU*: the time of the bare matrix products that a warm step needs, in bfloat16, alone, over the step's time.
- *seed*: steps a second of the preset ``seed`` (the same arithmetic) against the baseline's.
- *base pass*: tokens a second. *optimizer*: a step over the stage's parameters. *loss*: memory beside its results.
- *plan error* (``--plan``, minutes): planned over measured peak memory, less 1.
- *batch sizes* (``--batches``): tokens a second and memory of a warm step, by the tokens in it (``batch_sizes.py``).
- *time to quality* (``--quality``, many minutes): real weights, real text; seconds until the hard-token validation
  perplexity is as good as the baseline's best, base pass included on both sides (``time_to_quality.py``).
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import common
from benchmarks.naive_loop import BATCH_TOKENS, naive_losses, naive_stage
from benchmarks.workload import BLOCKS, CPU, LAYERS, SEQ_LEN, TOKENS, base_config, base_pass, steps_of, trainer
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.runtime.compute import Compute, choose_dtype, keep_freed_memory
from cascade_fast.settings import make_settings

# --- the baseline, in its own process ---------------------------------------------------------------------------------


def timed_order(batches: Iterator[Tensor], times: list[float]) -> Iterator[Tensor]:
    """Notes when each batch is asked for: the naive loop itself stays untouched."""
    for batch in batches:
        times.append(time.perf_counter())
        yield batch


def baseline_process(link: Connection) -> None:
    """Answers ``steps`` with the seconds of a naive step, ``pass`` with those of a naive base pass."""
    config = base_config()
    stage = naive_stage(config, LAYERS)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    hidden_ND, label_N = torch.randn(TOKENS, 576), torch.randint(0, 49_152, (TOKENS,))
    ids_BT = torch.randint(0, 49_152, (BLOCKS, SEQ_LEN))
    while (task := link.recv()) != "stop":
        if task == "steps":
            times: list[float] = []
            batches = torch.arange(8 * BATCH_TOKENS).split(BATCH_TOKENS)
            naive_losses(stage, hidden_ND, label_N, timed_order(iter(batches), times))
            # The first steps make the optimizer's state; in a long run they do not count.
            link.send(statistics.median(b - a for a, b in itertools.pairwise(times[2:])))
        else:
            start = time.perf_counter()
            with torch.inference_mode():
                out = base(ids_BT, output_hidden_states=True)
                torch.nn.functional.cosine_similarity(out.hidden_states[0], out.hidden_states[-1], dim=-1)
                del out
            link.send(time.perf_counter() - start)


# --- ours -------------------------------------------------------------------------------------------------------------


def bare_products(tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """The matrix products of one warm step, each alone and into memory that is there; and their FLOPs."""
    weights = [(192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    todo: list[tuple[Tensor, Tensor, Tensor]] = []

    def product(a: Tensor, b: Tensor) -> None:
        todo.append((a, b, torch.empty(a.shape[0], b.shape[1], dtype=dtype)))

    for out, inner in weights:
        w, x, g = (torch.randn(s).to(dtype) for s in ((out, inner), (tokens, inner), (tokens, out)))
        for _ in range(LAYERS):
            product(x, w.T)  # forward
            product(g, w)  # gradient of the input
            product(g.T, x)  # gradient of the weight
    head, x, g = (torch.randn(s).to(dtype) for s in ((49_152, 576), (tokens, 576), (tokens, 49_152)))
    product(x, head.T)
    product(g, head)

    def run() -> None:
        for a, b, out in todo:
            torch.mm(a, b, out=out)

    return run, sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in todo)


def loss_extra_bytes(dtype: torch.dtype) -> dict[int, int]:
    """Most memory the fused loss holds beside its results, for several batch sizes."""
    head_VD = torch.randn(49_152, 576).to(dtype)
    extra = {}
    for n in (32, 512, 4096, 32_768):
        hidden_ND, label_N = torch.randn(n, 576).to(dtype).requires_grad_(), torch.randint(0, 49_152, (n,))
        peak, _loss = common.peak_bytes(lambda h=hidden_ND, y=label_N: linear_cross_entropy(h, head_VD, y, dtype=dtype))
        extra[n] = peak - hidden_ND.numel() * hidden_ND.element_size()  # the gradient of the hidden states
    return extra


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_speed(rounds: int) -> dict[str, Any]:
    keep_freed_memory()  # as `python -m cascade_fast.train` does on a CPU
    dtype, _ = choose_dtype(CPU, "auto")
    context = multiprocessing.get_context("spawn")
    link, other_end = context.Pipe()
    process = context.Process(target=baseline_process, args=(other_end,), daemon=True)
    process.start()

    def ask(task: str) -> float:
        link.send(task)
        return link.recv()

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm_config, seed_config = make_settings({}), make_settings({"preset": "seed"})
        warm = trainer(warm_config, folder / "warm", dtype)
        products, flops = bare_products(warm_config.batch_tokens, dtype)
        variants = {
            "warm step": steps_of(warm, 1),
            "bare products": products,
            "seed step": steps_of(trainer(seed_config, folder / "seed", torch.float32), 1),
            "base pass": base_pass(folder / "pass", Compute(CPU, dtype), "entropy"),
            "base pass, cosine": base_pass(folder / "pass2", Compute(CPU, dtype), "cosine"),
        }
        seconds = {name: [] for name in ("naive step", "naive base pass", *variants)}
        for _ in range(rounds + 1):
            seconds["naive step"].append(ask("steps"))
            seconds["naive base pass"].append(ask("pass"))
            for name, run in variants.items():
                taken = []
                for _ in range(1 if "pass" in name else 5):
                    start = time.perf_counter()
                    run()
                    taken.append(time.perf_counter() - start)
                seconds[name].append(statistics.median(taken))
    link.send("stop")
    process.join()
    seconds = {name: values[1:] for name, values in seconds.items()}
    share = warm_config.batch_tokens / BATCH_TOKENS
    ratios = {
        "warm_ratio": common.ratio(seconds, "naive step", "warm step", share),
        "warm_mfu": common.ratio(seconds, "bare products", "warm step"),
        "seed_step_ratio": common.ratio(seconds, "naive step", "seed step"),
        "base_pass_ratio": common.ratio(seconds, "naive base pass", "base pass"),
        "base_pass_ratio_cosine": common.ratio(seconds, "naive base pass", "base pass, cosine"),
    }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {
        "naive hard tokens/s": BATCH_TOKENS / median["naive step"],
        "warm hard tokens/s": warm_config.batch_tokens / median["warm step"],
        "seed hard tokens/s": seed_config.batch_tokens / median["seed step"],
        "naive base pass tokens/s": BLOCKS * SEQ_LEN / median["naive base pass"],
        "base pass tokens/s": BLOCKS * SEQ_LEN / median["base pass"],
        "base pass tokens/s, cosine": BLOCKS * SEQ_LEN / median["base pass, cosine"],
        "bare products GFLOP/s": flops / median["bare products"] / 1e9,
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: common.percentiles(values) for name, values in seconds.items()},
        "ratios": ratios,
        "rates": rates,
        "loss_extra_bytes": loss_extra_bytes(dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="also measure the memory plan's error")
    parser.add_argument("--batches", action="store_true", help="also measure steps of other sizes")
    parser.add_argument(
        "--quality", action="store_true", help="also measure the time to the baseline's best perplexity"
    )
    parser.add_argument("--dataset", default="pydoc", help="text of --quality (default: %(default)s)")
    parser.add_argument("--train-blocks", type=int, default=112)
    parser.add_argument("--val-blocks", type=int, default=24)
    parser.add_argument("--most-epochs", type=int, default=10, help="of the baseline in --quality, as the seed's")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    args = parser.parse_args()

    from benchmarks import optimizer_step

    result: dict[str, Any] = {"environment": common.environment()}
    speed = measure_speed(args.rounds)
    common.print_table(f"{speed['dtype']} (seed and naive: float32)", list(speed["seconds"].items()), "s")
    common.print_table("ratios", list(speed["ratios"].items()), "times")
    for name, rate in speed["rates"].items():
        print(f"  {name:<32}{rate:>12,.0f}")
    result |= {name: round(values["p50"], 3) for name, values in speed["ratios"].items()}
    result["loss_extra_bytes"] = max(speed["loss_extra_bytes"].values())
    print(f"  loss: at most {result['loss_extra_bytes'] / 1e6:.1f} MB beside its results")
    step = optimizer_step.measure(args.rounds)
    common.print_table("optimizer step", list(step["seconds"].items()), "ms", 1e3)
    for key in ("adamw8bit_vs_bitsandbytes", "adamw8bit_vs_fused_adamw"):
        result[key] = round(step[key]["p50"], 3)
        print(f"  {key:<32}{result[key]:>12.2f}")
    result["details"] = {"speed": speed, "optimizer": step}
    if args.plan:
        from benchmarks import plan_error

        result["plan_error"] = plan_error.measure()
        print("plan error: " + ", ".join(f"{name} {error:+.1%}" for name, error in result["plan_error"].items()))
    if args.batches:
        from benchmarks import batch_sizes

        result["details"]["batches"] = batch_sizes.measure(args.rounds)
        batch_sizes.show(result["details"]["batches"])
    if args.quality:
        from benchmarks import time_to_quality

        quality = time_to_quality.measure(args.dataset, args.train_blocks, args.val_blocks, args.most_epochs)
        result["time_to_quality_ratio"], result["details"]["quality"] = round(quality["ratio"], 2), quality
        best, reached = quality["naive_best"], quality["reached"]
        print(
            f"time to a hard-token validation perplexity of {best['val_ppl']:.1f}: baseline {best['seconds']:.0f} s, "
            f"ours {reached['seconds']:.1f} s (step {reached['step']}, {reached['val_ppl']:.2f}): "
            f"{quality['ratio']:.1f} times"
        )
    if not args.no_record:
        print(f"\nrecorded in {common.record('stage_training', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
