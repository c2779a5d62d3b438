"""``python -m cascade_fast.baselines``: a cascade beside what else could be trained on the same text.

Every method is trained once for each number of epochs in ``--epochs-list``, as the learning rate's schedule depends on
it, LoRA and the full fine-tune also for each rate (and rank); each training is a run folder of its own. See
``docs/compare.md``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_fast.command_line import run_command, settings_parser, together
from cascade_fast.comparison.methods import METHODS, Grid, choose_methods, plan_trainings
from cascade_fast.input_checks import InputError, read_settings_file
from cascade_fast.settings import RunSettings, make_settings

DESCRIPTION = (
    "Train a cascade and, on the same text, what it has to be compared with: dense stages, random tokens, LoRA and the "
    "full fine-tune of the base, the seed recipe. Takes every flag of the trainer for the cascade; the same command "
    "again goes on where it was."
)
DEFAULT_EPOCHS = (1, 2)


def baselines_parser() -> argparse.ArgumentParser:
    parser = settings_parser("python -m cascade_fast.baselines", DESCRIPTION)
    group = parser.add_argument_group("comparison")
    known = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    group.add_argument("--only", nargs="+", metavar="METHOD", help=f"train these methods alone ({known})")
    group.add_argument("--skip", nargs="+", metavar="METHOD", default=[], help="leave these methods out")
    group.add_argument(
        "--epochs-list",
        nargs="+",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="numbers of epochs, a training for each (default: 1 2); --epochs N is a list of one",
    )
    grid = Grid()
    several: dict[str, Any] = {"nargs": "+", "metavar": "X", "type": float}
    group.add_argument(
        "--lora-ranks",
        **{**several, "type": int, "metavar": "N"},
        default=grid.lora_ranks,
        help="ranks of the method lora, a training for each rate and number of epochs",
    )
    group.add_argument("--lora-lrs", **several, default=grid.lora_lrs, help="learning rates of the method lora")
    group.add_argument("--full-lrs", **several, default=grid.full_lrs, help="learning rates of the full fine-tune")
    group.add_argument(
        "--second-look-lr",
        type=float,
        metavar="X",
        default=grid.second_look_lr,
        help="learning rate of the dense second look",
    )
    group.add_argument(
        "--seed-epochs",
        type=int,
        metavar="N",
        default=grid.seed_epochs,
        help="epochs of the seed recipe: it is slow",
    )
    return parser


def _is_given(name: str, given: dict[str, Any], settings_file: str | None) -> bool:
    """Whether the flags ``given`` or the file say what a setting is."""
    return name in given or (settings_file is not None and name in read_settings_file(Path(settings_file)))


def choose_epochs(given: dict[str, Any], settings_file: str | None, settings: RunSettings) -> Sequence[int]:
    """The numbers of epochs to train for: ``epochs_list`` of the flags ``given``, or ``epochs`` of flags or file alone.

    Raises:
        InputError: the flags have both.
    """
    epochs_list = given.get("epochs_list")
    if epochs_list is not None and "epochs" in given:
        raise InputError(f"epochs, epochs_list: {settings.epochs} and {epochs_list}; give one of them")
    if epochs_list is not None:
        return epochs_list
    return [settings.epochs] if _is_given("epochs", given, settings_file) else DEFAULT_EPOCHS


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of the trainer."""
    given = vars(baselines_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)
    only, skip = given.pop("only"), given.pop("skip")
    values = {name: given.pop(name) for name in ("lora_ranks", "lora_lrs", "full_lrs", "second_look_lr", "seed_epochs")}

    def work() -> None:
        if "resume" in given:
            raise InputError(f"resume: {given['resume']}; leave it out: a comparison always goes on where it was")
        methods = choose_methods(only, skip)
        settings = make_settings({n: value for n, value in given.items() if n != "epochs_list"}, settings_file)
        epochs_list = choose_epochs(given, settings_file, settings)
        if _is_given("batch_tokens", given, settings_file):
            values["finetune_batch_tokens"] = settings.batch_tokens
        trainings = plan_trainings(settings, methods, epochs_list, Grid(**values))
        # Imported here: a mistake in the flags is answered before torch is loaded.
        from cascade_fast.comparison.baselines import run_baselines

        with together():
            run_baselines(Path(str(settings.out)), trainings)

    return run_command(work, debug=debug, again="the same command", several=True)


if __name__ == "__main__":
    sys.exit(main())
