"""``python -m cascade_fast.baselines``: a cascade beside what else could be trained on the same text.

Every method is trained once for each number of epochs in ``--epochs-list``, as the learning rate's schedule depends on
it; each training is a run folder of its own. See ``docs/compare.md``.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_fast.command_line import run_command, settings_parser
from cascade_fast.input_checks import InputError, read_settings_file
from cascade_fast.settings import RunSettings, make_settings

DESCRIPTION = (
    "Train a cascade and, on the same blocks, what it has to be compared with: dense stages, random tokens, the full "
    "fine-tune of the base, the seed recipe. Takes every flag of the trainer for the cascade; the same command again "
    "goes on where it was."
)
METHODS = {
    "cascade": "the cascade as the flags have it",
    "dense-append": "one appended stage on every token",
    "dense-second-look": "one second look at every token: a fine-tune of the base's last layers",
    "random": "the cascade, with as many tokens drawn by chance as it has hard ones",
    "full": "the full fine-tune of the base",
    "seed": "one stage of the preset seed",
}
DEFAULT_EPOCHS = (1, 2)
# What the seed recipe takes from the flags: text, base and machine; the recipe is its own.
SHARED = (
    "seed", "max_minutes", "checkpoint_minutes", "cache_dir", "base", "device", "dataset", "text_columns",
    "text_template", "shuffle", "seq_len", "train_blocks", "val_blocks", "test_blocks", "layers_per_stage",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One run: method, and settings with ``out`` and ``epochs`` filled in."""

    method: str
    settings: RunSettings


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
    group.add_argument("--seed-epochs", type=int, metavar="N", default=1, help="epochs of the seed recipe: it is slow")
    group.add_argument("--full-lr", type=float, metavar="X", default=2.5e-4, help="learning rate of the full fine-tune")
    group.add_argument(
        "--second-look-lr", type=float, metavar="X", default=4e-4, help="learning rate of the dense second look"
    )
    return parser


def choose_methods(only: Sequence[str] | None, skip: Sequence[str]) -> list[str]:
    """The methods to train, in their order. Raises InputError for a name that is none, and where none is left."""
    for flag, names in (("only", only or ()), ("skip", skip)):
        for name in names:
            if name not in METHODS:
                raise InputError(f"{flag}: {name!r}; must be one of {', '.join(METHODS)}")
    chosen = [name for name in METHODS if (only is None or name in only) and name not in skip]
    if not chosen:
        raise InputError("only, skip: no method is left to train")
    return chosen


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
    in_file = settings_file is not None and "epochs" in read_settings_file(Path(settings_file))
    return [settings.epochs] if "epochs" in given or in_file else DEFAULT_EPOCHS


def plan_trainings(
    settings: RunSettings,
    methods: Sequence[str],
    epochs_list: Sequence[int],
    *,
    full_lr: float,
    second_look_lr: float,
    seed_epochs: int,
) -> list[Training]:
    """Every run to make. ``settings.out`` is the folder of them all.

    Raises:
        InputError: a setting that cannot work.
    """
    if settings.out is None:
        raise InputError("out: not given; must name the folder of the comparison")
    if min(epochs_list) < 1 or len(set(epochs_list)) < len(epochs_list):
        raise InputError(f"epochs_list: {list(epochs_list)}; must be different numbers, each at least 1")
    if settings.criterion == "random" and "random" in methods:
        raise InputError("criterion: 'random'; the method random is the same: leave one out (--skip random)")
    identity: dict[str, Any] = {"init": "identity", "head": "shared", "num_stages": 1, "hard_ratio": 1.0}
    shared = {name: value for name, value in settings.to_dict().items() if name in SHARED}
    seed = make_settings({**shared, "preset": "seed", "num_stages": 1})
    changed: dict[str, Callable[[], RunSettings]] = {
        "cascade": lambda: settings,
        "dense-append": lambda: dataclasses.replace(settings, **identity, stage_kind="append", kv="store"),
        "dense-second-look": lambda: dataclasses.replace(
            settings, **identity, stage_kind="second-look", lr=second_look_lr
        ),
        "random": lambda: dataclasses.replace(settings, criterion="random"),
        "full": lambda: dataclasses.replace(settings, lr=full_lr),
        "seed": lambda: seed,
    }
    trainings = []
    for method in methods:
        for epochs in [seed_epochs] if method == "seed" else sorted(epochs_list):
            out = str(Path(settings.out) / f"{method}-{epochs}")
            changes: dict[str, Any] = {"out": out, "epochs": epochs, "resume": "auto"}
            trainings.append(Training(method, dataclasses.replace(changed[method](), **changes)))
    return trainings


def run_baselines(folder: Path, trainings: Sequence[Training]) -> Path:
    """Trains what is not there yet, and compares; the path of the report."""
    from cascade_fast.cascade import run_cascade
    from cascade_fast.comparison.runs import train_all
    from cascade_fast.runtime.console import say
    from cascade_fast.training.full_finetune import full_finetune

    if any(t.method == "full" and t.settings.base_quantization != "none" for t in trainings):
        raise InputError("base_quantization: must be none for the full fine-tune (or --skip full)")
    runs = [(t.method, t.settings, full_finetune if t.method == "full" else run_cascade) for t in trainings]
    rows = train_all(folder, "baselines", runs)
    report = write_comparison(folder, rows)
    say(f"report: {report}")
    return report


def write_comparison(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """``report.md``, ``comparison.json``, ``comparison.csv`` and ``curves.png`` of these runs."""
    from cascade_fast.comparison import runs as comparison

    methods = list(dict.fromkeys(row["name"] for row in rows))
    reference = "cascade" if "cascade" in methods else methods[0]
    base = comparison.base_row(next(row for row in rows if row["name"] == reference))
    table = comparison.write_tables(folder, "baselines", [base, *rows])
    settings = rows[0]["settings"]
    panels = [
        ("seconds", "seconds: base pass and training", True),
        ("trained_tokens", "trained tokens", True),
        ("trained_layer_tokens", "trained tokens x layers trained", True),
    ]
    plot = comparison.plot_lines(folder / "curves.png", rows, panels, base_ppl=base["val_ppl"])
    parts = [
        "# A cascade and what it is compared with",
        f"Base {settings['base']}, text {settings['dataset']}: {settings['train_blocks']} blocks of "
        f"{settings['seq_len']} tokens to train on, the same for all, seed {settings['seed']}.",
        comparison.verdict(rows, "seconds", reference),
        comparison.verdict(rows, "trained_tokens", reference),
        table,
        "\n".join(f"- {name}: {METHODS[name]}" for name in methods),
        plot,
        "## At equal seconds",
        "In each line, the best validation perplexity that a method has reached within that time, of the runs that "
        "were made; nothing is read between them.",
        comparison.equal_cost_table(rows, "seconds"),
        "## At equal trained tokens",
        comparison.equal_cost_table(rows, "trained_tokens"),
        "Seconds are those of the base pass over all blocks (also where an earlier run had made it) and of the steps "
        "of training. Validation has chosen epochs and stages; the test blocks were looked at once by each run.",
    ]
    return comparison.write_report(folder, parts)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of the trainer."""
    given = vars(baselines_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)
    own = ("only", "skip", "seed_epochs", "full_lr", "second_look_lr")
    options = {name: given.pop(name) for name in own}

    def work() -> None:
        from cascade_fast.runtime.console import quiet_libraries

        quiet_libraries()
        if "resume" in given:
            raise InputError(f"resume: {given['resume']}; leave it out: a comparison always goes on where it was")
        methods = choose_methods(options.pop("only"), options.pop("skip"))
        settings = make_settings({n: value for n, value in given.items() if n != "epochs_list"}, settings_file)
        epochs_list = choose_epochs(given, settings_file, settings)
        trainings = plan_trainings(settings, methods, epochs_list, **options)
        run_baselines(Path(str(settings.out)), trainings)

    return run_command(work, debug=debug, again="the same command")


if __name__ == "__main__":
    sys.exit(main())
