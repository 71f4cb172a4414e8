"""One command in several processes, each of which runs it with its own number.

All compute, since a device is only reached by its own process; the first one speaks and
writes. They share the model's directory, the texts and the place of the result.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence

from jaxprune.arrays import processes
from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.prune_settings import PruneDevices

_START_FLAGS = ("--coordinator", "--processes", "--process-id")

_SAME = Rule(
    lambda v: v.first == v.words,
    "all processes must be started with the same words, but the first one has "
    "'{first}' and another one '{words}'",
    "give all the same",
)


@contextlib.contextmanager
def join_processes(
    devices: PruneDevices, console: Console, arguments: Sequence[str]
) -> Iterator[None]:
    """Joins the other processes; all but the first are silent inside.

    Args:
      devices: settings of this process.
      console: where the command writes.
      arguments: words of the command.

    Yields:
      Nothing; what is inside is done by all.

    Raises:
      ValueError: an option is out of range, or the processes' words differ.
      OSError: the others did not come.
    """
    # JAX must know the others before it looks for devices.
    processes.join(devices.coordinator, devices.processes, devices.process_id)
    if devices.coordinator is None:
        yield
        return
    words = " ".join(without_start(arguments))
    first = processes.on_first(lambda: words)
    # All learn of it, so that none waits for one that was refused.
    processes.together(lambda: check([_SAME], first=first, words=words))
    if processes.is_first():
        yield
        return
    console.silence()
    with contextlib.redirect_stderr(io.StringIO()):  # bars too
        yield


def without_start(arguments: Sequence[str]) -> list[str]:
    """The words without those that say which process of which run this is."""
    words, remaining = [], iter(arguments)
    for word in remaining:
        option, equals, _ = word.partition("=")
        if option.replace("_", "-") not in _START_FLAGS:
            words.append(word)
        elif not equals:  # its value is the next word
            next(remaining, None)
    return words
