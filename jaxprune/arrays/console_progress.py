"""How far a long job is: a bar on a terminal, a line now and then anywhere else."""

import collections
import contextlib
import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

# Seconds between two lines; a job that is shorter writes none.
_SECONDS = 10.0


def to_stderr(text: str) -> None:
    """Writes a line to stderr; where nobody reads it any more, nowhere."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        to_nowhere(sys.stderr)


def to_nowhere(stream: TextIO) -> None:
    """Lets a stream that nobody reads any more end without an error."""
    # What is still held must go somewhere.
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class Progress(contextlib.AbstractContextManager):
    """Shows on stderr how much of a job is done; a context.

    Example:
      >>> with Progress(2, "pruning", unit="segment") as progress:
      ...     for name in ("up", "down"):
      ...         progress.note(name)
      ...         progress.update()
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        unit: str = "step",
        done: int = 0,
        shown: bool = True,
        leave: bool = True,
    ) -> None:
        """Begins to count.

        Args:
          total: number of units there are to do.
          what: name of the job, such as "pruning".
          unit: name of what is counted, in the singular; "B" stands for bytes.
          done: number of units done before.
          shown: whether to show anything.
          leave: whether a finished bar stays on the terminal.
        """
        self._what, self._unit, self._note = what, unit, ""
        self._total, self._done, self._before = total, done, done
        # Times and what was done by then, of the later half of this run: programs are
        # compiled in the first units, and an estimate from those is far too long.
        self._history: collections.deque[tuple[float, int]] = collections.deque()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            leave=leave,
            disable=None if shown else True,  # None: where stderr is no terminal
        )
        self._shown = shown
        # tqdm disables its bar where stderr is no terminal; lines are written there.
        self._lines = shown and bool(self._bar.disable)
        self._start = self._last = time.monotonic()

    def __exit__(self, *_: object) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def note(self, text: str) -> None:
        """Says what is being done, behind the numbers."""
        self._note = text
        self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """Writes a line that stays, where anything is shown."""
        if self._shown:
            with tqdm.external_write_mode(sys.stderr):
                to_stderr(text)

    def update(self, count: int = 1) -> None:
        """Takes so much more as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        self._history.append((now, self._done))
        half = (self._before + self._done) / 2
        while len(self._history) > 2 and self._history[1][1] <= half:
            self._history.popleft()
        if self._lines and now - self._last >= _SECONDS:
            self._last = now
            to_stderr(self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        """What is done, what remains and about how long that will take."""
        done, total = str(self._done), f"{self._total} {self._unit}s"
        if self._unit == "B":
            done, total = (
                tqdm.format_sizeof(x, "B") for x in (self._done, self._total)
            )
        note = f" ({self._note})" if self._note else ""
        spent = tqdm.format_interval(seconds)
        line = f"{self._what}: {done} of {total}{note}, {spent} spent"
        return f"{line}, {self._estimate()}"

    def _estimate(self) -> str:
        """How long the rest will take, by the units after the first of this run."""
        (start, before), (now, done) = self._history[0], self._history[-1]
        rate = (done - before) / (now - start) if now > start else 0.0
        if self._done >= self._total:
            return "00:00 left"
        if rate <= 0:
            return "estimating what is left"
        return f"{tqdm.format_interval((self._total - self._done) / rate)} left"
