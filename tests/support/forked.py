"""Processes that tests start, and kill: forked from one that has imported the package.

A process of its own would need seconds for its imports, most of its time.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["experiments.scaled_down_llm", "experiments.report.sweep"]
)


def start(
    function: Callable[..., None], *arguments: Any, log: Path, **environment: str
) -> BaseProcess:
    """Calls a function that can be imported; what is printed goes to the log."""
    process = _FORKS.Process(
        target=_begin, args=(function, arguments, str(log), environment)
    )
    process.start()
    return process


def _begin(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    log: str,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # read when jax looks for its devices
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function(*arguments)


def code(process: BaseProcess, seconds: float | None = None) -> int:
    """What it ended with, -9 where it was killed; it has so many seconds."""
    process.join(seconds)
    assert process.exitcode is not None, "it still runs"
    return process.exitcode


def free_port() -> int:
    """A port where processes may find each other."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
