"""One optimizer step over a stage's parameters: ``python -m benchmarks.optimizer_step [--json FILE]``.

The stage of the default preset on SmolLM2-135M: 8 layers of hidden size 576 and intermediate size 1,536. Compared, in
turns, after a check that ours and bitsandbytes' agree: torch's fused AdamW, our 8-bit AdamW, bitsandbytes' on the CPU.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import common
from cascade_fast.training.adamw8bit import AdamW8bit

LAYER = [(192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]  # v, o, gate, up, down, norms
LAYERS = 8
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}
NAMES = ("fused adamw", "adamw8bit", "bitsandbytes adamw8bit")


def make_parameters(seed: int = 0, device: str = "cpu") -> list[torch.nn.Parameter]:
    """With gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in [*LAYER * LAYERS, (576,)]:
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) / 25).to(device))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
        params.append(p)
    return params


def check(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """The first step from the same parameters: codes equal to one, parameters to the last bits."""
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, atol=1e-8, rtol=2.4e-7)
            for name in ("state1", "state2"):
                a, b = ours.state[p][name], theirs.state[q][name]
                if a.dtype == torch.uint8:
                    assert (a.int() - b.int()).abs().max() <= 1, f"{name}: more than one code apart"


def measure(rounds: int) -> dict[str, object]:
    """Median seconds of a step, and ``adamw8bit_vs_*``: how many times ours beats the other (p20, p50, p80)."""
    import bitsandbytes

    optimizers = {
        "fused adamw": torch.optim.AdamW(make_parameters(), fused=True, **SETTINGS),
        "adamw8bit": AdamW8bit(make_parameters(), **SETTINGS),
        "bitsandbytes adamw8bit": bitsandbytes.optim.AdamW8bit(make_parameters(), **SETTINGS),
    }
    for optimizer in optimizers.values():
        optimizer.step()
    check(optimizers["adamw8bit"], optimizers["bitsandbytes adamw8bit"])
    seconds = common.interleaved({name: optimizers[name].step for name in NAMES}, rounds)
    return {
        "parameters": sum(p.numel() for p in make_parameters()),
        "rounds": rounds,
        "seconds": {name: common.percentiles(values) for name, values in seconds.items()},
        "adamw8bit_vs_bitsandbytes": common.ratio(seconds, "bitsandbytes adamw8bit", "adamw8bit"),
        "adamw8bit_vs_fused_adamw": common.ratio(seconds, "fused adamw", "adamw8bit"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args()
    result = {**common.environment(), **measure(args.rounds)}
    seconds = result["seconds"]
    title = f"one step, {result['parameters']:,} parameters, {result['threads']} threads"
    common.print_table(title, [(name, seconds[name]) for name in NAMES], "ms", 1e3)
    common.print_table(
        "ours is faster",
        [
            (f"than {name}", result[f"adamw8bit_vs_{key}"])
            for name, key in (("bitsandbytes'", "bitsandbytes"), ("torch's fused AdamW in float32", "fused_adamw"))
        ],
        "times",
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
