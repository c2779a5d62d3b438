"""Several runs side by side: trains what is not there yet, and a row of numbers for each.

Everything is read from the runs' ``results.json``. What a run has cost to train:

``seconds``              the base pass (also where an earlier run had made it) and the steps of training; not what all
                         runs alike have around it: loading, validation, reports
``trained_tokens``       tokens in the steps of training, of every stage and epoch
``trained_layer_tokens`` each of them times the layers that were trained on it
``layers_per_token``     of the result, on validation: base layers, and a stage's for the share of tokens that entered
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade_fast.cascade import NonFiniteLoss
from cascade_fast.input_checks import InputError
from cascade_fast.records import Final, RunResults
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.runtime.run_folder import read_any_results
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import find_base_for_stages

RECORD = "comparison.json"
Row = dict[str, Any]


def open_folder(folder: Path, command: str) -> None:
    """Makes ``folder`` the one of a comparison by ``command``, or finds it so.

    Raises:
        InputError: it holds something else; nothing in it has been touched then.
    """
    if folder.exists():
        record = folder / RECORD
        found = read_json(record) if record.exists() else {}
        if found.get("command") != command and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a {command} comparison")
        if found.get("command") == command:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"command": command, "rows": []})


def train_all(
    folder: Path, command: str, runs: Sequence[tuple[str, RunSettings, Callable[[RunSettings], object]]]
) -> list[Row]:
    """Trains what is not there yet of ``runs``: name, settings with ``out``, and what trains them; their rows.

    Raises:
        InputError: a base that cannot be had or copied, or a folder that holds something else; before any training.
    """
    for settings in {(c.stage_kind, c.layers_per_stage): c for _, c, _ in runs}.values():
        find_base_for_stages(settings)
    open_folder(folder, command)
    rows = []
    for number, (name, settings, train) in enumerate(runs, 1):
        assert settings.out is not None
        say(f"[{number}/{len(runs)}] {Path(settings.out).name}, {settings.epochs} epoch(s)")
        try:
            train(settings)
        except NonFiniteLoss as error:  # its results and report have been written: it counts as it is
            say(f"  {error}")
        rows.append(read_run(Path(settings.out), name))
    return rows


def read_run(folder: Path, name: str) -> Row:
    """The row of a finished run, a cascade or a full fine-tune; numbers as ``results.json`` has them."""
    results = read_any_results(folder)
    base, final, settings = results.base, results.final, results.settings
    tokens = sum(epoch.tokens for epoch in results.epochs)
    if isinstance(results, RunResults):
        layers = trained = settings["layers_per_stage"]
        training = sum(stage.seconds for stage in results.stages)
        shares = results.final.exit_share.values()
        entered = sum(number * share for number, share in enumerate(shares))  # stages that a token goes through
        stages = f"{results.final.stages_kept} of {len(results.stages)}"
    else:
        training = sum(epoch.seconds for epoch in results.epochs)
        layers, entered, trained, stages = 0, 0.0, base.layers, "-"
    test, base_test = final.all_token_test_ppl, final.base_test_ppl
    return {
        "name": name,
        "folder": folder.name,
        "epochs": settings["epochs"],
        "val_ppl": final.all_token_val_ppl,
        "val_change": final.all_token_val_ppl / base.val_ppl,
        "test_ppl": test,
        "test_change": None if test is None or base_test is None else test / base_test,
        "base_val_ppl": base.val_ppl,
        "base_test_ppl": base_test,
        "seconds": final.base_pass_seconds + training,
        "base_pass_seconds": final.base_pass_seconds,
        "training_seconds": training,
        "process_seconds": _process_seconds(folder, final),
        "trained_tokens": tokens,
        "trained_layer_tokens": tokens * trained,
        "layers_per_token": base.layers + layers * entered,
        "stages": stages,
        "settings": settings,
    }


def _process_seconds(folder: Path, final: Final) -> float | None:
    """From start to end, with the base pass; None for a run that was interrupted, which knows its last part only."""
    log = folder / "metrics.jsonl"
    if log.is_file() and any('"event": "resume"' in line for line in log.read_text(encoding="utf-8").splitlines()):
        return None
    return final.seconds + (final.base_pass_seconds if final.base_pass_reused else 0.0)


def base_row(row: Row) -> Row:
    """The base, as the run of ``row`` has measured it: nothing is trained."""
    nothing = dict.fromkeys(row, None)
    return {
        **nothing,
        "name": "base",
        "val_ppl": row["base_val_ppl"],
        "val_change": 1.0,
        "test_ppl": row["base_test_ppl"],
        "test_change": None if row["base_test_ppl"] is None else 1.0,
        "seconds": 0.0,
        "trained_tokens": 0,
        "trained_layer_tokens": 0,
    }
