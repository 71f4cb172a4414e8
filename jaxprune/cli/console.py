"""What a command says, and where: results on stdout, all else on stderr.

With `--json` stdout gets one JSON object and nothing else. Bars are shown on a terminal
only. A refusal is one sentence and exit code 1.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes.

    Attributes:
      json: print one JSON object to stdout, and nothing else there.
      debug: show where an error came from.
    """

    json: bool = False
    debug: bool = False


class Console:
    """Where a command's words go.

    Attributes:
      quiet: whether stdout is kept for one JSON object.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Writes a result for people, to stdout; nothing under `--json`."""
        if not self.quiet:
            print(text)

    def note(self, text: str) -> None:
        """Writes what is going on, to stderr."""
        tqdm.write(text, file=sys.stderr)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the JSON object, under `--json`."""
        if self.quiet:
            print(json.dumps(result, allow_nan=False))

    def bar(self, what: str, total: int, unit: str) -> Any:
        """A bar on stderr, where that is a terminal; to be closed.

        Args:
          what: is done.
          total: how much of it.
          unit: of what; "B" counts bytes.

        Returns:
          A tqdm bar.
        """
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            disable=None,
            leave=False,
        )


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text: the first column left, the others right.

    Args:
      header: names of the columns.
      rows: cells.

    Returns:
      Lines.

    Example:
      >>> print(columns(["name", "size"], [["a", "10"]]))
      name  size
      a       10
    """
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines)
