"""The first process of a distributed run acts alone, and all of them learn how it went.

What depends on a directory (is it saved? which is the newest?) may look different to
two processes that look at different moments. So one looks and sends its answer, or its
error, to the others; both must be picklable. All processes call these functions
together. With one process they are plain calls.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def join() -> None:
    """Joins the other processes of a run; called before anything else of JAX.

    Their address, their number and the number of this one are what the launcher says
    (Slurm, Open MPI, Kubernetes, Cloud TPU; see `jax.distributed.initialize`). Nothing
    is done where JAX was told before.

    Raises:
      OSError: no launcher is known, or the others did not come.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise OSError(
            f"the processes could not be joined ({error}); start them with srun, "
            "mpirun or on Kubernetes or Cloud TPU, or call jax.distributed.initialize "
            "first"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes: number 0, or the only one."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls a function on the first process; all wait and get what came of it."""
    if jax.process_count() == 1:
        return function()
    # The others wait in the broadcast until the first one has its answer.
    value, failure = _outcome(function) if is_first() else (None, None)
    try:
        pickle.loads(pickle.dumps(failure))
        sendable = failure
    except Exception:  # its words, where it cannot be pickled
        sendable = RuntimeError(f"{type(failure).__name__}: {failure}")
    value, reported = _broadcast((value, sendable))
    if failure or reported:
        raise failure or reported
    return value


def together(function: Callable[[], T]) -> T:
    """Calls a function on every process, for its own result; if one fails, all do."""
    if jax.process_count() == 1:
        return function()
    value, failure = _outcome(function)
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        number = int(np.argmax(failed))
        raise RuntimeError(f"process {number} failed; its own output says why")
    return value


def fetch(tree: Any) -> Any:
    """Arrays as NumPy, the whole of each, on every process."""

    def gathered(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        # A replicated array has all its values here already.
        if not spread or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _broadcast(value: Any) -> Any:
    """The first process's value on all; the others' own is not looked at."""
    content = pickle.dumps(value) if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Powers of two, so that few programs are compiled.
    padded = np.zeros(1 << size.bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    return pickle.loads(np.asarray(received)[:size].tobytes())
