"""What is said on the console: lines, tables, progress."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.status import Status
from rich.table import Table
from rich.text import Text

from cascade_fast.records import Epoch
from cascade_fast.runtime.visible import visible

LINE_SECONDS = 30.0  # between progress lines where there is no terminal
WORKING_SECONDS = 3.0  # after which work that shows no progress is named there
_ANY_WIDTH = 100_000  # cells
console = Console(highlight=False, emoji=False, soft_wrap=True)


def quiet_libraries() -> None:
    """No warnings and bars of transformers between our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def say(text: str) -> None:
    """Text for the user, on standard output; control characters in it are shown, not obeyed."""
    console.print(visible(text), markup=False)


# What Markdown would take for markup; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*<\[&~]|(?<![^\W_])_|_(?![^\W_])")


def literal(text: str) -> str:
    """Text of people's or models', on one line, that Markdown shows as it is; control characters as Python writes
    them."""
    return _MARKUP.sub(r"\\\g<0>", visible(text).replace("\n", "\\n").replace("\t", "\\t"))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def say_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A small table, its first column the names of the rows.

    Where it does not fit into the terminal (80 columns where there is none), or into what ``COLUMNS`` says, each row is
    told by itself, a line for every value: nothing is cut.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(visible(name)), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))  # as Text: brackets are no markup
    say(title)
    options = console.options.update(width=_ANY_WIDTH)
    if Measurement.get(console, options, table).maximum <= console.width:
        console.print(table)
        return
    longest = max(map(cell_len, header[1:]), default=0)
    for row in rows:
        say(f"  {row[0]}")
        for name, value in zip(header[1:], row[1:], strict=True):
            if value:
                say(f"    {name}{' ' * (longest - cell_len(name))}  {value}")


_moving: list[Status | RichProgress] = []  # on the terminal now: rich allows one at a time


@contextmanager
def working(what: str) -> Iterator[None]:
    """Names work that shows no progress: a spinner on a terminal, unless something moves there; elsewhere a line, if it
    takes long."""
    if console.is_terminal:
        if _moving:
            yield
            return
        spinner = console.status(Text(visible(what)))
        _moving.append(spinner)
        try:
            with spinner:
                yield
        finally:
            _moving.remove(spinner)
        return
    timer = threading.Timer(WORKING_SECONDS, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """Progress over tokens: a bar with tokens/s and ETA on a terminal, a line now and then elsewhere. ``loss`` is shown
    too where there is one."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.loss: float | None = None
        self._started = self._rate_started = self._last_line = time.monotonic()
        self._start_tokens = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            for other in _moving:
                other.stop()
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn(
                    "{task.completed:,}/{task.total:,}{task.fields[loss]}, {task.fields[rate]:,.0f} tokens/s, ETA"
                ),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task(self.name, total=self.total, rate=0.0, loss="")
            _moving.append(self._bar)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            _moving.remove(self._bar)

    def restart(self, done: int) -> None:
        """What counts as done when work goes on from a saved state, or begins anew."""
        self.done = self._start_tokens = done
        self._rate_started = time.monotonic()

    def advance(self, tokens: int) -> None:
        self.done += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self.rate(), loss=self._loss())
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            done = f"{self.done:,}/{self.total:,} tokens{self._loss()}"
            say(f"  {self.name}: {done}, {self.rate():,.0f} tokens/s, ETA {left:.0f} s")

    def _loss(self) -> str:
        return "" if self.loss is None else f", loss {self.loss:.4f}"

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def rate(self) -> float:
        """Tokens per second since the start, or since the work was taken up again."""
        return (self.done - self._start_tokens) / max(time.monotonic() - self._rate_started, 1e-9)


def epoch_line(epoch: Epoch) -> str:
    """An epoch in one line, for the console and the report."""
    return (
        f"epoch {epoch.epoch}: train_loss={epoch.train_loss:.4f}, val_loss={epoch.val_loss:.4f}, "
        f"val_ppl={epoch.val_ppl:.2f}, time={epoch.seconds:.1f}s, {epoch.tokens_per_second:,.0f} tokens/s"
    )


def format_count(n: int) -> str:
    """134515008 -> ``134.5M``."""
    return f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"
