"""The plots of docs/performance.md, from the newest line of ``results/stage_training.jsonl`` that has what they show.

python -m benchmarks.stage_training --batches --quality
python -m benchmarks.plots
"""

import json
from typing import Any

from matplotlib.figure import Figure

from benchmarks import common

IMAGES = common.ROOT / "docs" / "img"


def newest(key: str) -> dict[str, Any]:
    lines = (common.RESULTS / "stage_training.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in reversed(lines)]
    return next(record for record in records if key in record["details"])


def save(figure: Figure, name: str, record: dict[str, Any]) -> None:
    environment = record["environment"]
    figure.supxlabel(
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"commit {environment['commit']}", x=0.99, ha="right", fontsize=6, color="0.5",
    )  # fmt: skip
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, dpi=120, metadata={"Software": None})
    print((IMAGES / name).relative_to(common.ROOT))


def axes_of(figure: Figure, **labels: Any) -> Any:
    axes = figure.subplots()
    axes.set(**labels)
    axes.grid(alpha=0.3)
    return axes


def by_size(axes: Any, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.legend()


def tokens_per_second() -> None:
    record = newest("batches")
    rates = record["details"]["batches"]["tokens_per_second"]
    sizes = [int(size) for size in rates]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = axes_of(figure, xlabel="hard tokens in a step", ylabel="hard tokens / s", title="Training throughput")
    axes.plot(sizes, [rates[str(size)]["p50"] for size in sizes], "o-", label="preset warm")
    axes.fill_between(sizes, *([rates[str(size)][p] for size in sizes] for p in ("p20", "p80")), alpha=0.2)
    speed = record["details"]["speed"]["rates"]
    axes.plot([32], [speed["seed hard tokens/s"]], "s", label="preset seed")
    axes.plot([32], [speed["naive hard tokens/s"]], "X", label="loop of the original experiment")
    by_size(axes, sizes)
    save(figure, "tokens-per-second.png", record)


def memory() -> None:
    record = newest("batches")
    measured = record["details"]["batches"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = axes_of(
        figure, xlabel="hard tokens at once", ylabel="MiB beyond weights and optimizer",
        title="Peak of forward and backward",
    )  # fmt: skip
    for key, label, mark in (("plain_bytes", "all logits at once", "X--"), ("bytes", "preset warm", "o-")):
        sizes = [int(size) for size in measured[key]]
        axes.plot(sizes, [measured[key][str(size)] / 2**20 for size in sizes], mark, label=label)
    by_size(axes, sizes)
    save(figure, "memory.png", record)


def time_to_quality() -> None:
    record = newest("quality")
    quality = record["details"]["quality"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = axes_of(
        figure, xlabel="seconds, base pass included", ylabel="perplexity of the hard validation tokens",
        title=f"{quality['settings']['dataset']}, {quality['settings']['train_blocks']} training blocks",
    )  # fmt: skip
    courses = [("preset warm", quality["warm"]["points"], "o-")]
    if "seed" in quality:
        courses.append(("preset seed", quality["seed"]["points"][1:], "s-"))
    courses.append(("loop of the original experiment", quality["naive"]["epochs"], "X--"))
    for label, points, mark in courses:
        axes.plot([p["seconds"] for p in points], [p["val_ppl"] for p in points], mark, label=label)
    axes.set_yscale("log")
    axes.legend()
    save(figure, "time-to-quality.png", record)


if __name__ == "__main__":
    tokens_per_second()
    memory()
    time_to_quality()
