"""Long jobs say how far they are: a bar on a terminal, lines in a log."""

import io
import sys

import pytest

from jaxprune.arrays import console_progress
from jaxprune.arrays.console_progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    now = [0.0]
    monkeypatch.setattr(console_progress.time, "monotonic", lambda: now[0])
    return now


def count(clock, steps, seconds, **options):
    with Progress(steps, "pruning", unit="segment", **options) as progress:
        for i in range(steps):
            progress.note(f"layer_{i}")
            clock[0] += seconds
            progress.update()


def test_a_log_gets_lines_with_what_is_done_and_what_is_left(clock, capsys):
    count(clock, 4, 30.0)
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines() == [
        "pruning: 1 of 4 segments (layer_0), 00:30 spent, estimating what is left",
        "pruning: 2 of 4 segments (layer_1), 01:00 spent, 01:00 left",
        "pruning: 3 of 4 segments (layer_2), 01:30 spent, 00:30 left",
        "pruning: 4 of 4 segments (layer_3), 02:00 spent, 00:00 left",
    ]


def test_lines_are_ten_seconds_apart_at_least(clock, capsys):
    count(clock, 60, 1.0)
    assert len(capsys.readouterr().err.splitlines()) == 6


def test_short_jobs_write_nothing_to_a_log(clock, capsys):
    count(clock, 9, 1.0)
    assert not capsys.readouterr().err


def test_the_time_of_compiling_is_not_part_of_the_estimate(clock, capsys):
    """Two programs are compiled, in the first two units, for 100 seconds each."""
    with Progress(16, "pruning", unit="segment") as progress:
        for i in range(16):
            clock[0] += 110.0 if i < 2 else 10.0
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("01:50 spent, estimating what is left")
    for i in range(3, 16):  # the later half of the units holds none of the two
        seconds = 10 * (15 - i)
        assert lines[i].endswith(f"{seconds // 60:02}:{seconds % 60:02} left")


def test_what_was_done_before_is_not_part_of_the_rate(clock, capsys):
    with Progress(5, "writing", unit="file", done=2) as progress:
        for _ in range(2):
            clock[0] += 20.0
            progress.update()
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "writing: 4 of 5 files, 00:40 spent, 00:20 left"


def test_bytes_are_written_for_people(clock, capsys):
    with Progress(4_000_000, "reading", unit="B") as progress:
        for _ in range(2):
            clock[0] += 20.0
            progress.update(1_000_000)
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "reading: 2.00MB of 4.00MB, 00:40 spent, 00:40 left"


def test_nothing_is_shown_on_request(clock, capsys):
    count(clock, 4, 30.0, shown=False)
    assert not capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    count(clock, 4, 30.0)
    assert "4/4" in terminal.getvalue()
    assert " left" not in terminal.getvalue()
