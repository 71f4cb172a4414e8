"""The directory of a run: one run at a time, one configuration for good."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.harness import records
from jaxprune.arrays import processes
from jaxprune.files import atomic


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second run out of the directory; a killed process leaves no lock.

    All processes of a run call this together; the first one holds the lock.

    Raises:
      OSError: the directory cannot be written to, or another run has it.
    """
    with contextlib.ExitStack() as locks:
        # The lock is the kernel's, on an open file: it goes with the process, however
        # that ends.
        processes.on_first(lambda: _lock(out, locks))
        yield


def _lock(out: Path, locks: contextlib.ExitStack) -> None:
    try:
        locks.enter_context(atomic.locked(out))
    except OSError as error:
        # Another run holds it; the sentence of `atomic.locked` says so already.
        if error.errno == errno.EBUSY:
            raise OSError(error.strerror) from None
        raise OSError(
            f"--out '{out}' must be a directory that can be written to, got "
            f"{error.strerror}; give another"
        ) from error


def begun(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the directory holds this very run; writes config.json if it holds none.

    All processes of a run call this together.

    Raises:
      ValueError: the directory holds a run of another configuration, or is damaged.
    """
    return processes.on_first(lambda: _begun(out, identity))


def _begun(out: Path, identity: dict[str, Any]) -> bool:
    path = out / "config.json"
    if not path.exists():
        if (out / "results.json").exists():
            raise ValueError(
                f"'{out}' holds results but not their config.json; bring it back, or "
                "give another --out"
            )
        # Written before the first step, so that a run that is stopped soon is known
        # too.
        records.write_json(path, identity)
        return False
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"'{path}' must be the JSON that was written there, got {error}; bring it "
            "back, or give another --out"
        ) from error
    different = atomic.differences(before, identity)
    if different:
        raise ValueError(
            f"'{out}' holds a run of another configuration: {'; '.join(different)}; "
            "give the old values to continue, or another --out"
        )
    return True
