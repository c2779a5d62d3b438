"""``python -m cascade_fast.plan``: what a run takes - memory by phase, whether it fits, the time of an epoch.

Takes the flags of ``python -m cascade_fast.train``; needs neither a GPU nor weights, only the base's configuration.
"""

import argparse
import json
import math
import os
import sys

from cascade_fast.command_line import run_command, settings_parser
from cascade_fast.input_checks import ALL, InputError
from cascade_fast.planning.base_configs import BUILT_IN, base_configuration
from cascade_fast.settings import SPLITS, RunSettings, make_settings


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
        ("--link-gbs", "bandwidth between GPUs in GB/s, one way, instead of what is assumed"),
    ):
        machine.add_argument(flag, type=float, metavar="X", default=argparse.SUPPRESS, help=text)
    machine.add_argument("--gpus", type=int, metavar="N", default=1, help="how many GPUs share the run (default: 1)")
    machine.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of tables")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 it fits, 1 it does not, 2 a mistake in the settings."""
    given = vars(plan_parser().parse_args(argv))
    machine = {name: given.pop(name, None) for name in ("memory_gib", "tflops", "gbs", "ram_gib", "link_gbs")}
    gpus = given.pop("gpus")
    debug, as_json, settings_file = given.pop("debug", False), given.pop("json", False), given.pop("config", None)

    def work() -> int:
        settings = make_settings(given, settings_file)
        _check(settings, machine, gpus)
        return _print_plan(settings, machine, gpus, as_json)

    return run_command(work, debug=debug)


def _check(settings: RunSettings, machine: dict[str, float | None], gpus: int) -> None:
    if gpus < 1:
        raise InputError(f"gpus: {gpus}; must be at least 1")
    for name, value in machine.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}: {value}; must be above 0, and finite")
    for split in SPLITS:
        if settings.size(split) == ALL:
            raise InputError(f"{split}_{settings.unit}: all; a plan does not read the text: must be a number")


def _print_plan(settings: RunSettings, machine: dict[str, float | None], gpus: int, as_json: bool) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cascade_fast.base.model import cache_folder
    from cascade_fast.planning.devices import find_device
    from cascade_fast.planning.plan import make_plan
    from cascade_fast.planning.tables import plan_record, plan_text
    from cascade_fast.runtime.files import free_disk_bytes

    base_config = base_configuration(settings.base)
    device = find_device(settings.device, settings.dtype, **machine)
    if device.on_cpu and gpus > 1:
        raise InputError(f"gpus: {gpus}; must be 1 with device {settings.device}, which is a CPU here")
    disk_bytes = free_disk_bytes(cache_folder(settings)) if device.here else math.inf
    plan = make_plan(settings, base_config, device, disk_bytes, gpus=gpus)
    print(json.dumps(plan_record(plan)) if as_json else plan_text(plan))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
