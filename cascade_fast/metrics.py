"""What a run tells while it works: progress, lines on the console, and ``metrics.jsonl``."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from cascade_fast.files import room_for

LINE_SECONDS = 30.0  # between progress lines where there is no terminal

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False)


# What Markdown would take for markup; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*<\[&~]|(?<![^\W_])_|_(?![^\W_])")
# Characters that end a line, that a terminal or page obeys instead of showing them, or that no encoding can hold.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def literal(text: str) -> str:
    """Text of the user's, on one line, that Markdown shows as it is; control characters as Python writes them."""
    return _MARKUP.sub(r"\\\g<0>", _CONTROL.sub(lambda found: repr(found[0])[1:-1], text))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def say_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A small table: drawn on a terminal, one tab-free line a row elsewhere."""
    if not console.is_terminal:
        say(f"{title}: " + "; ".join(", ".join(f"{h} {v}" for h, v in zip(header, row, strict=True)) for row in rows))
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


class Progress:
    """Progress over tokens: a bar with tokens/s and ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._started = self._rate_started = self._last_line = time.monotonic()
        self._start_tokens = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} tokens"),
                TextColumn("{task.fields[rate]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(self.name, total=self.total, rate=0.0)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def restart(self, done: int) -> None:
        """What counts as done when work goes on from a saved state, or begins anew."""
        self.done = self._start_tokens = done
        self._rate_started = time.monotonic()

    def advance(self, tokens: int) -> None:
        self.done += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self.rate())
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            say(f"  {self.name}: {self.done:,}/{self.total:,} tokens, {self.rate():,.0f} tokens/s, ETA {left:.0f} s")

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def rate(self) -> float:
        """Tokens per second since the start, or since the work was taken up again."""
        return (self.done - self._start_tokens) / max(time.monotonic() - self._rate_started, 1e-9)


class MetricsLog:
    """``metrics.jsonl``: one JSON record a line, appended and flushed.

    ``size`` and ``truncate`` let a resumed run drop what came after its checkpoint, so that no epoch is told twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": time.time(), **fields}, allow_nan=False)
        with room_for(self.path, len(line)), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def first_line_size(self) -> int:
        """Bytes of the first line; 0 if there is none that is whole."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            line = file.readline()
        return len(line) if line.endswith(b"\n") else 0

    def truncate(self, size: int) -> None:
        """Keeps the whole lines among the first ``size`` bytes: a process may have died within the one after them."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            kept = file.read(size)
            file.truncate(kept.rfind(b"\n") + 1)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell.

    On Linux not ``ru_maxrss``: that is also the largest of whoever started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            (int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")), 0
        )
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def epoch_line(epoch: dict[str, Any]) -> str:
    """An epoch's record in one line, for the console and the report."""
    return (
        f"epoch {epoch['epoch']}: train_loss={epoch['train_loss']:.4f}, val_loss={epoch['val_loss']:.4f}, "
        f"val_ppl={epoch['val_ppl']:.2f}, time={epoch['seconds']:.1f}s, {epoch['tokens_per_second']:,.0f} tokens/s"
    )


def format_count(n: int) -> str:
    """134515008 -> ``134.5M``."""
    return f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"
