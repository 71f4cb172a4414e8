"""One command in several processes, each of which runs it with its own number.

All compute, since a device is only reached by its own process; the first one speaks and
writes. They share the model's directory, the texts and the place of the result.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence

from jaxprune.arrays import processes
from jaxprune.lm.steps.console import Console


@contextlib.contextmanager
def join_processes(
    distributed: bool, console: Console, arguments: Sequence[str]
) -> Iterator[None]:
    """Joins the other processes; all but the first are silent inside.

    Args:
      distributed: whether there are others.
      console: where the command writes.
      arguments: words of the command.

    Yields:
      Nothing; what is inside is done by all.

    Raises:
      ValueError: the processes' words differ.
      OSError: the others did not come.
    """
    if not distributed:
        yield
        return
    processes.join()  # JAX must know the others before it looks for devices
    words = " ".join(arguments)
    first = processes.on_first(lambda: words)

    def same() -> None:
        if words != first:
            raise ValueError(
                "all processes must be started with the same words, but the first one "
                f"has '{first}' and another one '{words}'; give all the same"
            )

    # All learn of it, so that none waits for one that was refused.
    processes.together(same)
    if processes.is_first():
        yield
        return
    console.silence()
    with contextlib.redirect_stderr(io.StringIO()):  # bars too
        yield
