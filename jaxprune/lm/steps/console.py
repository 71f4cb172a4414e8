"""What a job says, and where: results on stdout, all else on stderr.

With `--json` stdout gets one JSON object and nothing else. A refusal is one sentence
and exit code 1. A long job shows a bar on a terminal, elsewhere a line now and then.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxprune.arrays.console_progress import Progress, to_stderr


class Console:
    """Where a command writes.

    Attributes:
      quiet: whether stdout is kept for one JSON object.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._silent = False

    def silence(self) -> None:
        """Writes nothing from now on: another process speaks."""
        self._silent = True

    def say(self, text: str) -> None:
        """Writes a result for people, to stdout; nothing under `--json`."""
        if not (self.quiet or self._silent):
            # A text may have letters that the terminal has not.
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding))

    def note(self, text: str) -> None:
        """Writes what is going on, to stderr."""
        if not self._silent:
            to_stderr(text)

    def fail(self, text: str) -> None:
        """Writes why there is no result, to stderr; each process does."""
        to_stderr(text)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the JSON object, under `--json`."""
        if self.quiet and not self._silent:
            print(json.dumps(result, allow_nan=False))


@contextlib.contextmanager
def byte_progress(total: int, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how many bytes are done; what it yields is a writer's `progress=`."""
    before = 0  # a writer says how much is done in all, a bar wants what is new
    with Progress(total, what, unit="B", leave=False) as progress:

        def advance(what: str, done: int, total: int) -> None:
            nonlocal before
            progress.note(what)
            progress.update(done - before)
            before = done

        yield advance
