"""What a run tells its user on the console: at its start, after the base pass, of each stage, at its end."""

import math
import shlex
from pathlib import Path

import torch

from cascade_fast import ops
from cascade_fast.base.base_pass import BasePass
from cascade_fast.base.model import BaseModel
from cascade_fast.base.splits import SplitSequences
from cascade_fast.criteria import get_criterion, model_criteria
from cascade_fast.records import RunResults, StageRecord, routed_by, trained_by
from cascade_fast.reporting.outcome import general_table, general_title, merge_advice, merged_table
from cascade_fast.reporting.report import advice
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import format_count, say, say_table
from cascade_fast.runtime.run_folder import RunFolder, read_results
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import get_kind


def say_start(
    settings: RunSettings,
    folder: RunFolder,
    base: BaseModel,
    sequences: SplitSequences,
    compute: Compute,
) -> None:
    splits = sequences.splits.items()
    sizes = ", ".join(f"{of.tokens:,} {split}" for split, of in splits)
    count = sum(len(of) for _, of in splits)
    labels, tokens = sum(of.labels for _, of in splits), sum(of.tokens for _, of in splits)
    labelled = "" if labels == tokens else f", {labels / tokens:.1%} of them learnt and measured"
    say(f"cascade_fast {settings.preset}: {folder.path}")
    say(f"base {base.source}, {base.layers} layers")
    say(f"data {sequences.source}: {sizes} tokens in {count:,} sequences of at most {settings.seq_len}{labelled}")
    for line in (*sequences.usage.lines(), *sequences.notes):
        say(f"  {line}")
    if sequences.general is not None:
        say(f"other text {settings.general_text}: {sequences.general.tokens:,} tokens, read once, at the end")
    say(f"computing on {compute.device} in {compute.dtype_name} ({compute.reason})")
    say(f"operators: {operators_of(settings, compute.device)}")


def operators_of(settings: RunSettings, device: torch.device) -> str:
    """Which operators a run calls, who serves each, and where: tokens are selected and gathered where the hidden stores
    lie, on ``device`` or in the host's memory; all else is on ``device``. ``settings``: the plan's."""
    stores, on_cpu = device if settings.store == "device" else torch.device("cpu"), device.type == "cpu"
    calls = [("gather_rows", stores)]
    if settings.hard_ratio < 1:
        calls.insert(0, ("select_hard", stores))
    scored_by = {get_criterion(name).operator: None for name in (trained_by(settings), routed_by(settings))}
    calls += [(op, device) for op in (*scored_by, "cross_entropy_", "rms_norm", "add_rms_norm", "silu_mul") if op]
    if get_kind(settings.stage_kind).attends:
        if on_cpu:  # a stage that is measured leaves its keys and values, for which rows are scattered
            around: tuple[str, ...] = ("attention", "rotate_rows", "scatter_rows")
        else:
            around = ("place_heads", "take_heads") if ops.fused("place_heads", device) else ("rotate_rows",)
        calls += [(op, device) for op in around]
    if settings.adapter == "lora" and settings.base_quantization == "none":
        calls += [(op, device) for op in ("low_rank", "scale_into_")]
    calls += [(op, device) for op in _optimizer_operators(settings, device)]
    served: dict[str, list[str]] = {}
    for op, where in calls:
        served.setdefault(f"{ops.choose(op, where)} on {where}", []).append(op)
    return "; ".join(f"{', '.join(names)}: {by}" for by, names in served.items())


def _optimizer_operators(settings: RunSettings, device: torch.device) -> tuple[str, ...]:
    """Those of the optimizer and the loss scale; none of an optimizer that is torch's or bitsandbytes'."""
    if settings.optimizer == "adamw" and device.type == "cpu":
        return ()
    if settings.optimizer == "adamw":
        return ("grad_norm", "adamw_") if ops.fused("adamw_", device) else ("grad_norm",)
    own = device.type == "cpu" or (settings.optimizer == "adamw8bit" and ops.fused("adamw8bit", device))
    return ("adamw8bit",) if own else ()


def say_base_pass(passed: BasePass) -> None:
    tokens = sum(len(s) for s in passed.stores.values())
    if passed.reused:
        say(f"base pass: reused, {tokens:,} tokens")
    else:
        say(f"base pass: {tokens:,} tokens in {passed.seconds:.1f} s")


def say_stage(record: StageRecord) -> None:
    shares = record.exit_share
    say_table(
        f"stage {record.stage}, best epoch: validation perplexity of its hard tokens and of all, and where all exit",
        ["stage", "epoch", "hard ppl", "all ppl", *(name.replace("_", " ") for name in shares), "seconds"],
        [
            [
                str(record.stage),
                str(record.best_epoch),
                _number(record.best_val_ppl),
                _number(record.all_token_val_ppl),
                *(f"{share:.1%}" for share in shares.values()),
                f"{record.seconds:.1f}",
            ]
        ],
    )
    say(f"  {record.verdict}")


def say_summary(results: RunResults, folder: RunFolder) -> None:
    base, final, memory = results.base, results.final, results.memory
    assert memory is not None  # only earlier versions have none
    rows = [["validation", _number(base.val_ppl), _number(final.all_token_val_ppl)]]
    if final.base_test_ppl is not None:
        rows.append(["test", _number(final.base_test_ppl), _number(final.all_token_test_ppl)])
    say_table("all-token perplexity", ["split", "base", "cascade"], rows)
    merged, other = merged_table(results), general_table(final)
    if merged is not None:
        say_table("merged: the plain model of base and stage, every token in the stage", *merged)
    advised = merge_advice(results, shlex.quote(str(folder.path)))
    if advised is not None:
        say(advised.replace("`", ""))
    if other is not None and final.general is not None:
        say_table(f"{general_title(final.general)}: a rise above 0 is worse", *other)
    say(
        f"{final.stages_kept} stage(s) kept, {format_count(final.total_parameters)} parameters, "
        f"{final.seconds:.1f} s, peak memory {memory.measured_peak_bytes / 2**30:.2f} GiB"
        f" (planned {memory.planned.peak_bytes / 2**30:.2f}, {memory.planned.phase})"
    )
    say(f"page: {folder.page}")
    say(f"report: {folder.report}")


def say_next(folder: Path) -> None:
    """After a finished run: the commands that show what came of it, or what to try where nothing did."""
    results = read_results(folder)
    if results.final.stages_kept == 0:
        say("\n".join(advice(results)).replace("`", ""))
    elif routed_by(results.settings) in model_criteria():
        run = shlex.quote(str(folder))
        say("next:")
        say(f'  python -m cascade_fast.generate {run} "Your text" --compare-base')
        say(f"  python -m cascade_fast.evaluate {run}")


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
