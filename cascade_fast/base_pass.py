"""``python -m cascade_fast.base_pass``: the base pass of a training, before it; whole, or one shard of it as a job.

Takes the flags of ``python -m cascade_fast.train``, which then finds the pass in the cache folder.
"""

import argparse
import re
import sys

from cascade_fast.command_line import run_command, settings_parser, together
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.processes import stay_alone
from cascade_fast.settings import RunSettings, make_settings

MOST_SHARDS = 99_999


def build_parser() -> argparse.ArgumentParser:
    """The trainer's flags, and which shard."""
    parser = settings_parser(
        "python -m cascade_fast.base_pass",
        "Make the base pass of a training before it: the base reads every text once, and what it leaves is kept in "
        "--cache-dir. Takes the flags of train, which then uses it. With --shard it makes one part of it, as one of "
        "many jobs that know nothing of each other and share that folder.",
        without=("shard",),  # that of a stage, which is none of the base pass's
    )
    part = parser.add_argument_group("part")
    part.add_argument(
        "--shard",
        metavar="N/COUNT",
        default=argparse.SUPPRESS,
        help="make part N, from 1, of COUNT of every split: 3/64; the last job, or the training, joins them",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the settings, 130 interrupted."""
    given = vars(build_parser().parse_args(argv))
    debug, settings_file, shard = given.pop("debug", False), given.pop("config", None), given.pop("shard", None)

    def work() -> None:
        part = None if shard is None else parse_shard(shard)
        settings = make_settings(given, settings_file)
        if part is not None:
            stay_alone()  # jobs know nothing of each other, however they are started
        with together():
            _make(settings, part)

    return run_command(work, debug=debug, again="the same command", several=True)


def parse_shard(text: str) -> tuple[int, int]:
    """``3/64`` as number and count. Raises InputError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
    if match is None:
        raise InputError(f"shard: {text!r}; must be N/COUNT, the part and how many there are: 3/64")
    number, count = int(match[1]), int(match[2])
    if not 1 <= count <= MOST_SHARDS:
        raise InputError(f"shard: {text!r}; the count must be 1 to {MOST_SHARDS:,}")
    if not 1 <= number <= count:
        raise InputError(f"shard: {text!r}; the parts are 1/{count} to {count}/{count}")
    return number, count


def _make(settings: RunSettings, shard: tuple[int, int] | None) -> None:
    # Imported here: a mistake in the flags is answered before torch is loaded.
    from cascade_fast.base.base_pass import base_pass, make_shard, pass_folder
    from cascade_fast.base.model import cache_folder
    from cascade_fast.inputs import read_inputs
    from cascade_fast.planning.devices import this_machine
    from cascade_fast.planning.plan import make_plan
    from cascade_fast.runtime.compute import Compute
    from cascade_fast.runtime.console import say
    from cascade_fast.runtime.files import free_disk_bytes
    from cascade_fast.runtime.processes import processes
    from cascade_fast.stages.kind import base_needs
    from cascade_fast.training.messages import say_base_pass

    compute = Compute.choose(settings.device, settings.dtype)
    inputs = read_inputs(settings, compute)
    settings, base, sequences = inputs.settings, inputs.base, inputs.sequences
    train, cache = sequences.splits["train"], cache_folder(settings)
    plan = make_plan(settings, base.config, this_machine(compute), free_disk_bytes(cache), train.labels / train.tokens)
    plan = plan.of_first(processes())
    if shard is not None and plan.settings.kv != settings.kv:
        raise InputError("kv: auto; depends on the machine, and all shards must be made alike: store or recompute")
    needs = base_needs(plan.settings)
    say(f"base pass: {str(pass_folder(base, sequences, plan.settings, needs, compute, cache))!r}")
    if shard is None:
        passed = base_pass(base, sequences, plan.settings, needs, compute, cache)
    else:
        number, count = shard
        made = make_shard(base, sequences, plan.settings, needs, compute, cache, number, count)
        if made is None:
            return
        passed = made
    say_base_pass(passed)


if __name__ == "__main__":
    sys.exit(main())
