"""The first process of a distributed run acts alone, and all of them learn how it went.

What depends on a directory (is it saved? which is the newest?) may look different to
two processes that look at different moments. So one looks and sends its answer, or its
error, to the others; both must be picklable. All processes call these functions
together. With one process they are plain calls.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxprune.arrays.rules import Rule, check, needs, within

T = TypeVar("T")


def join(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes of a run; called before anything else of JAX.

    Args:
      coordinator: address HOST:PORT where process 0 listens; "auto" where everything is
        known to the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU); None for one
        process.
      processes: number of processes; None where the cluster knows.
      process_id: number of this process, from 0; None where the cluster knows.

    Raises:
      ValueError: a number is out of range or given without the coordinator.
      OSError: the cluster does not know what was left out, or the others did not come.
    """
    check(_JOINING, coordinator=coordinator, processes=processes, process_id=process_id)
    if coordinator is None:
        return
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise OSError(
            f"the processes could not be joined ({error}); give --coordinator, "
            "--processes and --process-id"
        ) from error


_NEEDS_COORDINATOR = (
    "--processes and --process-id need --coordinator HOST:PORT, got none"
)
_JOINING = (
    needs("processes", "coordinator", _NEEDS_COORDINATOR),
    needs("process_id", "coordinator", _NEEDS_COORDINATOR),
    Rule(
        lambda v: (
            v.coordinator in (None, "auto")
            or v.coordinator.rpartition(":")[2].isdecimal()
        ),
        "--coordinator must be HOST:PORT or auto, got '{coordinator}'",
    ),
    within("processes", 1, math.inf, "--processes must be at least 1, got {processes}"),
    Rule(
        lambda v: (
            v.process_id is None
            or 0 <= v.process_id < (v.processes or v.process_id + 1)
        ),
        "--process-id must be from 0 to --processes - 1, got {process_id} of "
        "{processes}",
    ),
)


def is_first() -> bool:
    """Whether this is the process that writes: number 0, or the only one."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls a function on the first process; all wait and get what came of it."""
    if jax.process_count() == 1:
        return function()
    # The others wait in the broadcast until the first one has its answer.
    value, failure = _outcome(function) if is_first() else (None, None)
    value, reported = _broadcast((value, _sendable(failure)))
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


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _broadcast(value: Any) -> Any:
    """The first process's value on all; the others' own is not looked at."""
    content = pickle.dumps(value) if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Powers of two, so that few programs are compiled.
    padded = np.zeros(1 << size.bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    return pickle.loads(np.asarray(received)[:size].tobytes())
