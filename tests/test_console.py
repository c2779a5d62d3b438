"""What moves on the console: progress with loss, rate and ETA, and work that shows none."""

import io
import threading

import pytest
from rich.console import Console

from cascade_fast.runtime import console
from cascade_fast.runtime.console import Progress, say, working


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    file = io.StringIO()
    made = Console(file=file, force_terminal=True, width=100, highlight=False, emoji=False, soft_wrap=True)
    monkeypatch.setattr(console, "console", made)
    return file


def test_progress_on_a_terminal(terminal):
    with Progress("stage 1 epoch 1/2", 4000) as progress:
        progress.restart(0)
        progress.advance(1000)
        assert progress._bar is not None
        progress._bar.refresh()
        progress.loss = 3.25
        progress.advance(1000)
        progress._bar.refresh()
    text = terminal.getvalue()
    assert "1,000/4,000, " in text
    assert "2,000/4,000, loss 3.2500, " in text
    assert "tokens/s, ETA" in text


def test_progress_without_one(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", -1.0)
    with Progress("stage 1 epoch 1/2", 4000) as progress:
        progress.advance(1000)
        progress.loss = 3.25
        progress.advance(1000)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("  stage 1 epoch 1/2: 1,000/4,000 tokens, ")
    assert second.startswith("  stage 1 epoch 1/2: 2,000/4,000 tokens, loss 3.2500, ")
    assert " tokens/s, ETA " in second


def test_work_that_takes_long_is_named_once(monkeypatch):
    said, heard = [], threading.Event()

    def hear(text):
        said.append(text)
        heard.set()

    monkeypatch.setattr(console, "say", hear)
    monkeypatch.setattr(console, "WORKING_SECONDS", 0.01)
    with working("reading the text"):
        assert heard.wait(60)
    assert said == ["reading the text ..."]


def test_work_that_does_not_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console, "WORKING_SECONDS", 3600.0)
    before = threading.active_count()
    with working("reading the text"):
        pass
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert threading.active_count() <= before
    assert capsys.readouterr().out == ""


def test_work_on_a_terminal_spins_and_gives_way(terminal):
    with working("reading [the] text"):
        say("a line")
        with working("loading the base"), Progress("base pass", 100) as progress:  # rich allows one at a time
            progress.advance(10)
            with working("hashing"):
                pass
    text = terminal.getvalue()
    assert "reading [the] text" in text
    assert "a line" in text
    assert "loading the base" not in text
    assert "hashing" not in text
    assert console._moving == []
