"""The report of a run, ``report.md`` with its plots and ``report.html``, from the run's folder alone."""

from pathlib import Path
from typing import Any

from cascade_fast.criteria import model_criteria, score_label
from cascade_fast.input_checks import InputError, one_line
from cascade_fast.presets import SECOND_LOOK_PRESET
from cascade_fast.records import Epoch, Ledger, RunRecord, RunResults, StageRecord, routed_by, trained_by, training_size
from cascade_fast.reporting.heat_map import read_heat_map
from cascade_fast.reporting.html import HEAT_MAP, MACHINE, SETTINGS, render_page
from cascade_fast.reporting.outcome import general_table, general_title, merge_advice, merged_table
from cascade_fast.reporting.plots import write_plots
from cascade_fast.reporting.samples import make_samples, read_samples
from cascade_fast.runtime.console import epoch_line, format_count, literal, markdown_table, say
from cascade_fast.runtime.files import atomic_write_text, load_record
from cascade_fast.runtime.run_folder import CONFIG, REPORT, check_run, read_results
from cascade_fast.selection import threshold_text
from cascade_fast.stages.kind import get_kind

DIAGNOSIS_RULE = (
    "Rule: *clear overfitting* if the first epoch has the lowest validation loss while the training loss falls on; "
    "*mild overfitting* if a later epoch has it, but not the last one; *none seen* if the last epoch has it. "
    "One epoch alone does not tell."
)


def write_report(folder: Path) -> Path:
    """Writes ``report.md``, ``report.html`` and the plots that :func:`write_plots` finds worth it into ``folder``.

    Raises:
        InputError: not the folder of a finished run, or a file in it is damaged. No report has been written then.
    """
    check_run(folder, results=True)
    run = load_record(folder / CONFIG, RunRecord.from_dict)
    results = read_results(folder)
    tokens, samples = read_heat_map(folder), read_samples(folder)
    try:
        score_name = score_label(routed_by(results.settings))
        plots = write_plots(folder, results, score_name=score_name)
        markdown = render_report(run, results, plots, samples=samples, heat_map=tokens is not None)
        images = {name: (folder / name).read_bytes() for name in plots}
        page = render_page(markdown, images, tokens, score_name=score_name)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"run: a file in {str(folder)!r} is damaged: no report can be made ({reason})") from error
    path = folder / REPORT
    atomic_write_text(path.with_suffix(".html"), page)
    atomic_write_text(path, markdown)  # last: a folder with this file is complete
    return path


def add_samples(folder: Path, device: str) -> None:
    """Sample text for the report, once the run has measured everything and has let go of its memory.

    The run is finished: whatever is missing here (memory, a base that was moved) costs the samples and nothing else.
    """
    try:
        if make_samples(folder, device):
            write_report(folder)
            say("sample text: in the report")
    except Exception as error:
        say(f"sample text: none, {type(error).__name__}: {one_line(error)}")


def diagnose(epochs: list[Epoch]) -> str:
    """The overfitting diagnosis of one stage; see ``DIAGNOSIS_RULE``."""
    if len(epochs) < 2:
        return "not to be told from one epoch"
    best = min(range(len(epochs)), key=lambda i: epochs[i].val_loss)
    if best == len(epochs) - 1:
        return "none seen"
    return "clear overfitting" if best == 0 else "mild overfitting"


def render_report(
    run: RunRecord,
    results: RunResults,
    plots: list[str],
    *,
    samples: list[dict[str, Any]],
    heat_map: bool,
) -> str:
    """The report as Markdown: what came of the run first, what it was made with last."""
    stages = results.stages
    parts = [
        f"# CASCADE: preset {results.settings['preset']}, hard ratio {results.settings['hard_ratio']}",
        _summary(results),
        *_merged(results),
        *_general(results),
        *_samples(samples),
        f"## {HEAT_MAP}",
        "[report.html](report.html) shows some validation text token by token, coloured by exit, score or change of "
        "loss."
        if heat_map
        else "This run has no `heat_map.json`: it was removed, or the run is older than the file.",
        "## What to try next",
        _next(results),
        "## Base model",
        _base(results),
        *(_stage(stage) for stage in stages),
        "## Analysis",
        "### Overfitting",
        DIAGNOSIS_RULE,
        markdown_table(
            ["stage", "training loss", "validation loss", "diagnosis"], [_overfitting_row(s) for s in stages]
        ),
        "### Thresholds",
        markdown_table(
            ["stage", "threshold", "hard of those that arrive"],
            [[_n(s.stage), threshold_text(s.threshold), f"{s.train_hard:,} / {s.train_total:,}"] for s in stages],
        ),
        f"A token enters a stage if its score ({score_label(routed_by(results.settings))}) is at or below the "
        f"threshold.{_chosen_apart(results)}",
        "### Validation",
        "Perplexity on the hard tokens is measured on a different set at each stage; the column over all tokens, each "
        "at its own exit, is the one that compares.",
        markdown_table(
            ["stage", "hard tokens, by epoch", "all tokens", "kept"],
            [["base", "", _ppl(results.base.val_ppl), ""], *(_validation_row(s) for s in stages)],
        ),
        "### Where tokens exit",
        _exits(results),
        "### Parameters",
        _parameters(results),
        *(["### Compute", _compute(results.compute, stages)] if results.compute is not None else []),
        *(f"![{name.removesuffix('.png')}]({name})" for name in plots),
        f"## {SETTINGS}",
        markdown_table(["setting", "value"], [[k, literal(_show(v))] for k, v in results.settings.items()]),
        f"## {MACHINE}",
        markdown_table(["", ""], [[k, literal(str(v))] for k, v in {**run.machine, **run.versions}.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(results: RunResults) -> str:
    base, final = results.base, results.final
    rows = [("validation", base.val_ppl, final.all_token_val_ppl)]
    if final.base_test_ppl is not None and final.all_token_test_ppl is not None:
        rows.append(("test", final.base_test_ppl, final.all_token_test_ppl))
    table = markdown_table(
        ["all-token perplexity", "base", "cascade", "change"],
        [[name, _ppl(before), _ppl(after), f"{after / before - 1:+.2%}"] for name, before, after in rows],
    )
    kept, trained = final.stages_kept, len(results.stages)
    return (
        f"Base {literal(base.name)}, text {literal(results.settings['dataset'])}. "
        f"{kept} of {trained} trained stage(s) kept. {final.seconds:.0f} seconds, "
        f"peak memory {final.peak_rss_bytes / 2**30:.2f} GiB.\n\n{table}\n\n"
        "Validation chose epochs and stages; test was measured once, at the end."
    )


def _merged(results: RunResults) -> list[str]:
    """A section; nothing where the cascade is no plain model."""
    table, stages = merged_table(results), results.settings["layers_per_stage"]
    if table is None:
        return []
    return [
        "## Merged",
        f"With every token in the stage, its {stages} layers take the place of the base's last {stages}: a plain "
        "model, as large as the base.",
        markdown_table(*table),
        merge_advice(results, "RUN") or "",
    ]


def _general(results: RunResults) -> list[str]:
    """A section; nothing where no other text was read."""
    table, general = general_table(results.final), results.final.general
    if table is None or general is None:
        return []
    title = general_title(general)
    return [
        f"## {title[0].upper()}{literal(title[1:])}",
        "Not trained on, and read once, at the end. A rise above 0: training has made the model worse there.",
        markdown_table(*table),
    ]


def _samples(samples: list[dict[str, Any]]) -> list[str]:
    """A section with a table for each prompt; nothing for a run without samples."""
    if not samples:
        return []

    def line(text: str) -> str:
        return literal(text.replace("\n", " \u21b5 "))

    return [
        "## Sample text",
        "How each goes on from the start of a validation text, taking the likeliest token every time. \u21b5 is a "
        "line break.",
        *(
            markdown_table(
                ["prompt", line(sample["prompt"])],
                [["base", line(sample["base"])], ["cascade", line(sample["cascade"])]],
            )
            for sample in samples
        ),
    ]


def advice(results: RunResults) -> list[str]:
    """What to try next, judged by how the run went: a sentence each, settings as flags in backquotes."""
    settings, stages, kept = results.settings, results.stages, results.final.stages_kept
    attends = get_kind(settings["stage_kind"]).attends
    second_look = "`--preset second-look`"
    if results.base.layers < SECOND_LOOK_PRESET["layers_per_stage"]:
        second_look = f"`--stage-kind second-look --layers-per-stage {results.base.layers}`"
    flag, size = training_size(settings)
    more_text = f"`{flag} {4 * size}`"
    if kept == 0:
        tries = [f"a lower learning rate (`--lr {settings['lr'] / 3:.1g}`)"]
        if settings["hard_ratio"] < 0.9:
            tries.append("a higher hard ratio (`--hard-ratio 0.9`)")
        tries.append(f"more text ({more_text})")
        if not attends:
            tries.append(f"stages that read the text again ({second_look})")
        return [f"No stage was kept: the cascade is its base. Worth a try, one at a time: {', '.join(tries)}."]
    found = []
    for stage in stages:
        if diagnose(stage.epochs) in ("clear overfitting", "mild overfitting"):
            found.append(f"Stage {stage.stage} overfits: more text ({more_text}), or fewer epochs.")
    last = stages[kept - 1]
    if last.stopped == "all epochs done" and diagnose(last.epochs) == "none seen":
        found.append(
            f"The validation loss of stage {kept} still fell in its last epoch: more of them "
            f"(`--epochs {2 * settings['epochs']}`)."
        )
    if not attends:
        found.append(f"Stages that read the text again gain more, and cost more: {second_look}.")
    elif settings["exit_threshold"] == "trained" and settings["hard_ratio"] < 1:
        found.append("Perhaps more tokens gain from the stage than it was trained on: `--exit-threshold validation`.")
    return found


def _chosen_apart(results: RunResults) -> str:
    chosen = trained_by(results.settings)
    if chosen == routed_by(results.settings):
        return ""
    return f" The tokens it was trained on, as many, were chosen by another score: {score_label(chosen)}."


def _next(results: RunResults) -> str:
    parts = ["\n".join(f"- {sentence}" for sentence in advice(results))]
    if routed_by(results.settings) in model_criteria() and results.final.stages_kept:
        parts.append("With the cascade as it is, `RUN` being this folder:")
        parts.append(
            '```\npython -m cascade_fast.generate RUN "Your text" --compare-base\n'
            "python -m cascade_fast.evaluate RUN --sweep-threshold curve.csv\n```"
        )
    return "\n\n".join(filter(None, parts))


def _base(results: RunResults) -> str:
    base, tokens = results.base, results.tokens
    return "\n".join(
        [
            f"- {literal(base.name)} ({literal(base.source)})",
            f"- parameters: {base.parameters:,} ({format_count(base.parameters)})",
            f"- layers: {base.layers}",
            f"- tokens: {tokens.train:,} training, {tokens.val:,} validation, {tokens.test:,} test",
            f"- validation perplexity: {base.val_ppl:.4f}",
        ]
    )


def _stage(stage: StageRecord) -> str:
    share = stage.train_hard / stage.train_total
    rows = [
        ["threshold", threshold_text(stage.threshold)],
        *(
            [["exit threshold, chosen on validation", threshold_text(stage.exit_threshold)]]
            if stage.exit_threshold != stage.threshold
            else []
        ),
        ["training hard tokens", f"{stage.train_hard:,} / {stage.train_total:,} ({share:.1%})"],
        ["validation hard tokens", f"{stage.val_hard:,}"],
        ["added parameters", f"{stage.added_parameters:,} ({format_count(stage.added_parameters)})"],
        ["trainable parameters", f"{stage.trainable_parameters:,}"],
        ["best epoch", _n(stage.best_epoch)],
        ["best val ppl (hard tokens)", _ppl(stage.best_val_ppl)],
        ["all-token val ppl", _ppl(stage.all_token_val_ppl)],
        ["training time", f"{stage.seconds:.1f} s"],
        ["training ended", stage.stopped],
    ]
    log = "\n".join(epoch_line(e) for e in stage.epochs)
    verdict = stage.verdict[0].upper() + stage.verdict[1:]
    return f"## Stage {stage.stage}\n\n{verdict}.\n\n{markdown_table(['item', 'value'], rows)}\n\n```\n{log}\n```"


def _overfitting_row(stage: StageRecord) -> list[str]:
    def course(losses: list[float]) -> str:
        return " → ".join(f"{loss:.3f}" for loss in losses)

    train, val = [e.train_loss for e in stage.epochs], [e.val_loss for e in stage.epochs]
    return [_n(stage.stage), course(train), course(val), diagnose(stage.epochs)]


def _validation_row(stage: StageRecord) -> list[str]:
    by_epoch = " → ".join(f"{e.val_ppl:.2f}" for e in stage.epochs)
    return [_n(stage.stage), by_epoch, _ppl(stage.all_token_val_ppl), "yes" if stage.accepted else "no"]


def _exits(results: RunResults) -> str:
    stages = results.stages
    names = ["base", *(f"stage_{s.stage}" for s in stages)]
    rows = [
        [f"after stage {s.stage}", *(f"{s.exit_share[n]:.1%}" if n in s.exit_share else "" for n in names)]
        for s in stages
    ]
    return markdown_table(["validation tokens", *names], rows)


def _parameters(results: RunResults) -> str:
    total = results.base.parameters
    rows = [["base", "", f"{total:,} ({format_count(total)})"]]
    for stage in (s for s in results.stages if s.accepted):
        total += stage.added_parameters
        rows.append(
            [_n(stage.stage), f"+ {format_count(stage.added_parameters)}", f"{total:,} ({format_count(total)})"]
        )
    return markdown_table(["stage", "added", "cumulative"], rows)


def _compute(ledger: Ledger, stages: list[StageRecord]) -> str:
    lines = [("base pass", ledger.base_pass)]
    lines += [(f"stage {s.stage}", s.compute) for s in stages if s.compute is not None]
    table = markdown_table(
        ["", "tokens", "layer-tokens", "TFLOP", "seconds", "MFU"],
        [
            [
                name,
                f"{line.tokens:,}",
                f"{line.layer_tokens:,}",
                f"{line.flops / 1e12:.2f}",
                f"{line.seconds:.1f}",
                "-" if line.mfu is None else f"{line.mfu:.2f}",
            ]
            for name, line in lines
        ],
    )
    text = (
        "FLOPs that the model needs; MFU is their rate over that of a square product on this device, "
        f"{ledger.matmul_flops_per_second / 1e9:,.0f} GFLOP/s. Training counts every epoch, validation none."
    )
    if ledger.compared is not None:
        ours, dense, seed = ledger.compared.stage_1, ledger.compared.dense_stage, ledger.compared.seed_recipe
        text += (
            f"\n\nStage 1 took {ours.flops / dense.flops:.0%} of the FLOPs of a dense stage (every token, "
            f"as many epochs) in {ours.steps:,} steps; the original recipe would need "
            f"{seed.flops / ours.flops:.2f} times the FLOPs on the same tokens, in {seed.steps:,} steps."
        )
    return f"{table}\n\n{text}"


def _n(value: Any) -> str:
    return "-" if value is None else f"{value}"


def _ppl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else _n(value)
