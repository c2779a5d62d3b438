"""Several runs side by side: trains what is not there yet, and a row of numbers for each.

All but the memory is read from the runs' ``results.json``. What a run has cost to train:

``seconds``              the base pass (also where an earlier run had made it) and the steps of training; not what all
                         runs alike have around it: loading, validation, reports
``trained_tokens``       tokens in the steps of training, of every stage and epoch
``trained_layer_tokens`` each of them times the layers that were trained on it
``trained_parameters``   of the result: of the stages that were kept, or of the fine-tune
``peak_bytes``           the most memory that the run has held: of torch on a GPU, else of the process, libraries
                         included; None where the system does not tell, or the run was interrupted
``layers_per_token``     of the result, on validation: base layers, and a stage's for the share of tokens that entered
``merged``               whether the result is one plain model with the base's layers
``general_rise``         how much the loss on text that was not trained on has risen, in nats; None: not measured
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError
from cascade_fast.records import Final, FinetuneResults, RunResults
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.runtime.processes import by_first, processes
from cascade_fast.runtime.run_folder import CONFIG, RESULTS, read_any_results
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import find_base_for_stages
from cascade_fast.training.trainer import NonFiniteLoss

RECORD = "comparison.json"
Row = dict[str, Any]


def open_folder(folder: Path, command: str) -> None:
    """Makes ``folder`` the one of a comparison by ``command``, or finds it so.

    Raises:
        InputError: it holds something else; nothing in it has been touched then.
    """
    if folder.exists():
        found = read_record(folder)
        if found.get("command") != command and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a {command} comparison")
        if found.get("command") == command:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"command": command, "rows": []})


def read_record(folder: Path) -> dict[str, Any]:
    """``comparison.json``; empty where there is none."""
    record = folder / RECORD
    return read_json(record) if record.exists() else {}


def train_all(
    folder: Path, command: str, runs: Sequence[tuple[str, RunSettings, Callable[[RunSettings], object]]]
) -> list[Row]:
    """Trains what is not there yet of ``runs``: name, settings with ``out``, and what trains them; their rows, of each
    run its own and, where it has been measured as one plain model, that one's.

    Raises:
        InputError: a base that cannot be had or copied, a device that is not there, or a folder that holds something
            else; before any training.
    """
    with processes().first_before_others():
        for settings in {(c.stage_kind, c.layers_per_stage): c for _, c, _ in runs}.values():
            find_base_for_stages(settings)
    computes = [Compute.choose(settings.device, settings.dtype) for _, settings, _ in runs]
    by_first(open_folder)(folder, command)
    these, rows = processes(), list[Row]()
    for number, ((name, settings, train), compute) in enumerate(zip(runs, computes, strict=True), 1):
        assert settings.out is not None
        out = Path(settings.out)
        say(f"[{number}/{len(runs)}] {out.name}, {settings.epochs} epoch(s)")
        # Not the part of a run that goes on, nor one that is finished. (A fine-tune begins anew, and has no CONFIG.)
        whole = not (out / CONFIG).exists() and not (out / RESULTS).exists()
        measured = whole and compute.reset_peak_memory()
        try:
            train(settings)
        except NonFiniteLoss as error:  # its results and report have been written: it counts as it is
            say(f"  {error}")
        these.wait()  # for the first process, which has written the results
        record = read_record(folder)
        peaks = record.get("peak_bytes", {})  # by run: those of another selection of runs stay
        if measured and these.first:
            peaks[out.name] = compute.peak_memory_bytes()
            write_json(folder / RECORD, {**record, "peak_bytes": peaks})
        rows += read_rows(out, name, peaks.get(out.name))
    return rows


def read_rows(folder: Path, name: str, peak_bytes: int | None = None) -> list[Row]:
    """The row of a finished run, a cascade or a fine-tune; numbers as ``results.json`` has them. A second one where a
    cascade has been measured as one plain model."""
    results = read_any_results(folder)
    row = _row(folder, name, results, peak_bytes)
    merged = results.final.merged if isinstance(results, RunResults) else None
    if merged is None:
        return [row]
    general = results.final.general
    numbers = {
        "name": f"{name} merged",
        "layers_per_token": merged.layers_per_token,
        "merged": True,
        "general_rise": None if general is None else general.merged_rise,
    }
    return [row, {**row, **numbers, **_perplexities(row, merged.all_token_val_ppl, merged.all_token_test_ppl)}]


def _row(folder: Path, name: str, results: RunResults | FinetuneResults, peak_bytes: int | None) -> Row:
    base, final, settings = results.base, results.final, results.settings
    tokens = sum(epoch.tokens for epoch in results.epochs)
    variant = f"lr {settings['lr']}"
    if isinstance(results, RunResults):
        trained_layers, layers_per_token = settings["layers_per_stage"], results.layers_per_token
        training = sum(stage.seconds for stage in results.stages)
        parameters = sum(stage.trainable_parameters for stage in results.stages if stage.accepted)
        stages = f"{results.final.stages_kept} of {len(results.stages)}"
    else:
        trained_layers, layers_per_token, stages = base.layers, float(base.layers), "-"
        training = sum(epoch.seconds for epoch in results.epochs)
        parameters = base.parameters if results.trained_parameters is None else results.trained_parameters
        if results.method == "lora":
            variant = f"rank {settings['lora_rank']}, {variant}"
    row = {"base_val_ppl": base.val_ppl, "base_test_ppl": final.base_test_ppl, "base_layers": base.layers}
    return {
        "name": name,
        "folder": folder.name,
        "variant": variant,
        "epochs": settings["epochs"],
        **_perplexities(row, final.all_token_val_ppl, final.all_token_test_ppl),
        **row,
        "seconds": final.base_pass_seconds + training,
        "base_pass_seconds": final.base_pass_seconds,
        "training_seconds": training,
        "process_seconds": _process_seconds(folder, final),
        "trained_tokens": tokens,
        "trained_layer_tokens": tokens * trained_layers,
        "trained_parameters": parameters,
        "peak_bytes": peak_bytes,
        "layers_per_token": layers_per_token,
        "merged": isinstance(results, FinetuneResults),
        "general_rise": None if final.general is None else final.general.rise,
        "stages": stages,
        "settings": settings,
    }


def _perplexities(row: Row, val: float, test: float | None) -> Row:
    """``row``: what it is compared with, the base's in the same run."""
    base_test = row["base_test_ppl"]
    return {
        "val_ppl": val,
        "val_change": val / row["base_val_ppl"],
        "test_ppl": test,
        "test_change": None if test is None or base_test is None else test / base_test,
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
        **_perplexities(row, row["base_val_ppl"], row["base_test_ppl"]),
        "name": "base",
        "seconds": 0.0,
        "trained_tokens": 0,
        "trained_layer_tokens": 0,
        "trained_parameters": 0,
        "layers_per_token": float(row["base_layers"]),
        "merged": True,
        "general_rise": None if row["general_rise"] is None else 0.0,
    }
