"""The first process of a distributed run acts alone, and all of them learn how it went.

What depends on a folder (is it saved? which is the newest?) may look different to two
processes that look at different moments. So one looks and sends its answer, or its
error, to the others. With one process these are plain calls.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the process that writes.

    Returns:
      True on process 0, and where there is only one.

    Example:
      >>> from jaxprune.arrays import processes
      >>> processes.is_first()
      True
    """
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Calls a function on the first process; every process gets what came of it.

    All processes call this together. The others wait until the first one is done.

    Args:
      function: takes nothing; what it returns or raises must be picklable.

    Returns:
      What the function returned on the first process.

    Raises:
      Exception: what the function raised there, on every process; a RuntimeError with
        its words where it cannot be sent.

    Example:
      >>> from jaxprune.arrays import processes
      >>> processes.on_first(lambda: 3)
      3
    """
    if jax.process_count() == 1:
        return function()
    value: Any = None
    failure: Exception | None = None
    if is_first():
        try:
            value = function()
        except Exception as error:
            failure = error
    value, reported = _broadcast((value, _sendable(failure)))
    if failure or reported:
        raise failure or reported
    return value


def together(function: Callable[[], T]) -> T:
    """Calls a function on every process; when one fails, all do.

    All processes call this together and leave it together.

    Args:
      function: takes nothing.

    Returns:
      What it returned on this process.

    Raises:
      Exception: what it raised on this process; a RuntimeError that names the process
        where it failed on another one only.

    Example:
      >>> from jaxprune.arrays import processes
      >>> processes.together(lambda: 3)
      3
    """
    if jax.process_count() == 1:
        return function()
    value: Any = None
    failure: Exception | None = None
    try:
        value = function()
    except Exception as error:
        failure = error
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        number = int(np.argmax(failed))
        raise RuntimeError(f"process {number} failed; its own output says why")
    return value


def _sendable(error: Exception | None) -> Exception | None:
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
