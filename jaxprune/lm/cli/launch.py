"""One command in several processes, each of which runs it with its own number.

All compute, since a device is only reached by its own process; the first one speaks and
writes. They share the model's directory, the texts and the place of the result.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import ClassVar

from jaxprune.arrays import processes
from jaxprune.lm.cli.console import Console

_OF_THE_START = ("--coordinator", "--processes", "--process-id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Which of several processes this is.

    Attributes:
      coordinator: HOST:PORT of the first of several processes that do this together, or
        "auto" where the cluster knows (Slurm, Open MPI, Kubernetes, Cloud TPU).
      processes: how many there are; left out where the cluster knows.
      process_id: which of them this is, from 0; left out likewise.
    """

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "devices": ("coordinator", "processes", "process_id")
    }

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


@contextlib.contextmanager
def joined(
    options: ProcessOptions, console: Console, arguments: Sequence[str]
) -> Iterator[None]:
    """Joins the other processes; all but the first are silent inside.

    Args:
      options: of this process.
      console: where the command writes.
      arguments: the command's words.

    Yields:
      Nothing; what is inside is done by all.

    Raises:
      ValueError: an option is out of range, or the processes' words differ.
      OSError: the others did not come.
    """
    processes.join(options.coordinator, options.processes, options.process_id)
    if options.coordinator is None:
        yield
        return
    own = without_start(arguments)
    first = processes.on_first(lambda: own)

    def check() -> None:
        if first != own:
            raise ValueError(
                "all processes must be started with the same words, but the first one "
                f"has '{' '.join(first)}' and another one '{' '.join(own)}'; give all "
                "the same"
            )

    processes.together(check)
    if processes.is_first():
        yield
        return
    console.silence()
    with contextlib.redirect_stderr(io.StringIO()):  # bars too
        yield


def without_start(arguments: Sequence[str]) -> list[str]:
    """The words without those that say which process of which run this is."""
    words, left = [], iter(arguments)
    for word in left:
        option, given, _ = word.partition("=")
        if option.replace("_", "-") not in _OF_THE_START:
            words.append(word)
        elif not given:
            next(left, None)
    return words
