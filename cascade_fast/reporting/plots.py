"""The plots of a report: those with more points than a table shows better."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_fast.records import RunResults, StageRecord
from cascade_fast.runtime.files import atomic_write

LEAST_POINTS = 3  # along a plot's axis


def write_plots(folder: Path, results: RunResults, *, score_name: str) -> list[str]:
    """Writes ``loss.png``, ``threshold.png`` and ``perplexity.png``, as far as there is enough to see; their names.

    ``score_name``: what a token's score is, in words.
    """
    stages = results.stages
    measured = [stage for stage in stages if stage.all_token_val_ppl is not None]
    shown = []

    def draw(name: str, points: int, plot: Callable[..., None], *of: Any) -> None:
        if points < LEAST_POINTS:
            return
        from matplotlib.figure import Figure  # without pyplot: no display, no global state

        figure = Figure(figsize=(6, 4), layout="constrained")
        plot(figure.subplots(), *of)
        atomic_write(folder / name, lambda path: figure.savefig(path, format="png", dpi=120))
        shown.append(name)

    draw("loss.png", max((len(stage.epochs) for stage in stages), default=0), _loss, stages)
    draw("threshold.png", len(stages), _threshold, stages, score_name)
    draw("perplexity.png", 1 + len(measured), _perplexity, results.base.val_ppl, measured)
    return shown


def _loss(axes: Any, stages: list[StageRecord]) -> None:
    for stage in stages:
        x = [e.epoch for e in stage.epochs]
        (line,) = axes.plot(x, [e.train_loss for e in stage.epochs], "o--", label=f"stage {stage.stage}, training")
        axes.plot(
            x,
            [e.val_loss for e in stage.epochs],
            "o-",
            color=line.get_color(),
            label=f"stage {stage.stage}, validation",
        )
    axes.set(xlabel="epoch", ylabel="cross-entropy of hard tokens (nats)", title="Loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _threshold(axes: Any, stages: list[StageRecord], score: str) -> None:
    axes.plot([s.stage for s in stages], [s.threshold for s in stages], "o-")
    axes.set(xlabel="stage", ylabel=score, title="Threshold by stage", xticks=[s.stage for s in stages])


def _perplexity(axes: Any, base_ppl: float, measured: list[StageRecord]) -> None:
    names = ["base", *(f"stage {s.stage}" + ("" if s.accepted else "\n(rejected)") for s in measured)]
    colours = ["C7", *("C0" if s.accepted else "C3" for s in measured)]
    bars = axes.bar(names, values := [base_ppl, *(s.all_token_val_ppl for s in measured)], color=colours)
    axes.bar_label(bars, labels=[f"{v:.3f}" for v in values])
    axes.set(ylabel="perplexity over all validation tokens", title="All-token perplexity by stage")
    axes.margins(y=0.15)
