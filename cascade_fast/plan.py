"""``python -m cascade_fast.plan``: what a run takes - memory by phase, whether it fits, the time of an epoch.

Takes the flags of ``python -m cascade_fast.train``; needs neither a GPU nor weights, only the base's configuration.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from cascade_fast.command_line import run_command, settings_parser
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.visible import visible
from cascade_fast.settings import ALL, RunSettings, make_settings

_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
# Shapes as in the models' own config.json (HuggingFaceTB/SmolLM2-*, meta-llama/Meta-Llama-3-8B).
BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _SMOLLM2
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "smollm2-360m": _SMOLLM2
    | {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "smollm2-1.7b": _SMOLLM2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def base_configuration(base: str) -> Any:
    """transformers' configuration of a built-in name, a local folder or a hub id. Raises InputError."""
    from transformers import AutoConfig

    from cascade_fast.base.model import hub_reachable, read_base_config

    if base in BUILT_IN:
        return AutoConfig.for_model(**BUILT_IN[base])
    path = Path(base)
    if not path.is_dir() and not hub_reachable():
        raise InputError(
            f"base: {base!r}; must be a folder with a config.json, one of {', '.join(BUILT_IN)}, or a hub id (the hub "
            "cannot be reached)"
        )
    return read_base_config(base, base)


def plan_parser() -> argparse.ArgumentParser:
    """The trainer's flags, and the machine's numbers."""
    parser = settings_parser(
        "python -m cascade_fast.plan",
        "Plan a run: memory by phase, whether it fits, the time of an epoch. Needs neither a GPU nor weights: --base "
        f"may be a folder with a config.json, a hub id, or one of {', '.join(BUILT_IN)}. --device cpu, cuda and auto "
        "read this machine. A GPU that is not here: --device t4, l4, a100, v100, h100, rtx3090 or rtx4090; any other "
        "by its --memory-gib, --tflops and --gbs, without --device.",
    )
    machine = parser.add_argument_group("machine")
    for flag, text in (
        ("--memory-gib", "memory of the GPU in GiB; beside --device: instead of that device's"),
        ("--tflops", "peak TFLOP/s in the compute dtype, without sparsity; beside --device: as above"),
        ("--gbs", "memory bandwidth in GB/s; beside --device: as above"),
        ("--ram-gib", "host RAM beside the GPU in GiB, instead of what is assumed"),
    ):
        machine.add_argument(flag, type=float, metavar="X", default=argparse.SUPPRESS, help=text)
    machine.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of tables")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 it fits, 1 it does not, 2 a mistake in the settings."""
    given = vars(plan_parser().parse_args(argv))
    machine = {name: given.pop(name, None) for name in ("memory_gib", "tflops", "gbs", "ram_gib")}
    debug, as_json, settings_file = given.pop("debug", False), given.pop("json", False), given.pop("config", None)

    def work() -> int:
        for name, value in machine.items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}: {value}; must be above 0, and finite")
        return _print_plan(make_settings(given, settings_file), machine, as_json)

    return run_command(work, debug=debug)


def _print_plan(settings: RunSettings, machine: dict[str, float | None], as_json: bool) -> int:
    for name in ("train_blocks", "test_blocks"):
        if getattr(settings, name) == ALL:
            raise InputError(f"{name}: all; a plan does not read the text: must be a number")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cascade_fast.base.model import cache_folder
    from cascade_fast.planning.counts import Shape
    from cascade_fast.planning.memory import CONTEXT_BYTES, largest_batch_tokens
    from cascade_fast.planning.roofline import (
        base_pass_time,
        epoch_time,
        find_device,
        gib,
        plan_on,
        short_memory,
        with_kv,
    )
    from cascade_fast.runtime.compute import dtype_name
    from cascade_fast.runtime.files import free_disk_bytes

    base_config = base_configuration(settings.base)
    device, dtype = find_device(settings.device, settings.dtype, **machine)
    free = free_disk_bytes(cache_folder(settings)) if device.here else math.inf
    settings, kv_lines = with_kv(settings, base_config, device, dtype, free)
    plan = plan_on(settings, base_config, device, dtype)
    shape = Shape.from_settings(settings, base_config)
    base_time = base_pass_time(settings, base_config, device, dtype)
    epoch = epoch_time(settings, base_config, device, dtype, plan.micro_batch_tokens)
    largest = largest_batch_tokens(settings, base_config, device.memory_bytes, dtype=dtype, on_cpu=device.on_cpu)
    fits = plan.fits(device.memory_bytes, device.ram_bytes)
    if as_json:
        print(
            json.dumps(
                {
                    **plan.to_dict(),
                    "device": device.name,
                    "fits": fits,
                    "largest_batch_tokens": largest,
                    "base_pass_seconds": base_time.seconds,
                    "base_pass_limit": base_time.limit,
                    "epoch_seconds": epoch.seconds,
                    "epoch_limit": epoch.limit,
                    "kv": settings.kv if shape.kind.attends else None,
                }
            )
        )
        return 0 if fits else 1
    print(f"{visible(settings.base)}: {shape.base_parameters():,} parameters, {base_config.num_hidden_layers} layers")
    print(f"a stage: {shape.stage.layers} layers, {shape.counts.parameters():,} parameters of its own")
    print(f"{device.name}, {dtype_name(dtype)}\n")
    print(f"| {'phase':<16} | {'what':<38} | {'GiB':>7} |")
    print(f"|{'-' * 18}|{'-' * 40}|{'-' * 8}:|")
    for phase in plan.phases:
        for kind, parts in (("", phase.lasting), ("", phase.passing), (" (mapped)", phase.mapped)):
            for name, size in parts.items():
                print(f"| {phase.name:<16} | {name + kind:<38} | {gib(size):>7} |")
        print(f"| {phase.name:<16} | {'**peak**':<38} | {gib(phase.peak):>7} |")
    for name, size in plan.ram.items():
        print(f"| {'host RAM':<16} | {name:<38} | {gib(size):>7} |")
    if plan.ram:
        print(f"| {'host RAM':<16} | {'while base or a new stage is loaded':<38} | {gib(plan.ram_loading):>7} |")
        print(f"| {'host RAM':<16} | {'hidden stores (mapped)':<38} | {gib(plan.ram_mapped):>7} |")
    for name, size in plan.disk.items():
        print(f"| {'disk':<16} | {name:<38} | {gib(size):>7} |")
    print()
    context = "" if device.on_cpu else f", {gib(CONTEXT_BYTES)} GiB of it the CUDA context's"
    print(f"{short_memory(plan, device)}{context}")
    if plan.ram:
        print(f"host RAM: {gib(plan.ram_needed)} GiB of {gib(device.ram_bytes)}")
    print(
        f"batch: {settings.batch_tokens} tokens, {plan.micro_batch_tokens} at once; the largest that fits: {largest:,}"
    )
    for line in kv_lines:
        print(line)
    for what, taken in (("base pass", base_time), ("an epoch of stage 1", epoch)):
        print(
            f"{what}: at least {taken.seconds:.1f} s, limited by {taken.limit} (FLOPs {taken.flops:.1f} s, bytes "
            f"{taken.bytes:.1f} s, launches {taken.launches:.1f} s)"
        )
    print(
        f"assumed: {device.rate(dtype) / 1e12:.2f} TFLOP/s ({device.flops_fraction:.0%} of peak), "
        f"{device.bytes_per_second * device.bandwidth_fraction / 1e9:.0f} GB/s ({device.bandwidth_fraction:.0%}), "
        f"{device.launch_seconds * 1e6:.0f} us a launch"
        + (f", {gib(device.ram_bytes)} GiB of host RAM" if not device.here and machine["ram_gib"] is None else "")
    )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
