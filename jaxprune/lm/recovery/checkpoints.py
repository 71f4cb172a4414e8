"""The state of a training loop on disk, so that a killed one resumes.

Two slots are written in turn, so that one of them is whole at any moment. A directory
belongs to one job; another job's is refused.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import placement
from jaxprune.posttraining.progress import ProgressLog

# Seconds without a checkpoint at least, and the share of the time that writing takes.
_SECONDS, _SHARE = 1.0, 0.05


class Checkpoints:
    """What a loop has done so far.

    Example:
      >>> import pathlib, tempfile
      >>> place = pathlib.Path(tempfile.mkdtemp())
      >>> Checkpoints(place, {"steps": 8}).write(3, {"w": jnp.ones(2)}, [0.5])
      >>> step, state, record = Checkpoints(place, {"steps": 8}).last(
      ...     {"w": jnp.zeros(2)}
      ... )
      >>> step, state["w"].tolist(), record
      (3, [1.0, 1.0], [0.5])
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        """Opens or begins the directory of a job, which is what decides the result."""
        self._log = ProgressLog(directory, job)
        self._slot = 0
        self._wait, self._since = _SECONDS, time.monotonic()

    def last(self, like: Any) -> tuple[int, Any, Any]:
        """The last step that is whole on disk: its number, its state and its record.

        Args:
          like: state of the same structure and shapes, placed as the result is to be.

        Returns:
          Step 0, `like` and None where nothing was written.
        """
        entries = [(slot, self._log.read(f"state_{slot}")) for slot in (0, 1)]
        complete = [(slot, *entry) for slot, entry in entries if entry is not None]
        if not complete:
            return 0, like, None
        slot, arrays, body = max(complete, key=lambda entry: entry[2]["step"])
        self._slot = 1 - slot  # the older of the two is overwritten next
        leaves, structure = jax.tree.flatten(like)
        # Copies: the files are mapped, and a step gives up the arrays that it is given.
        state = [
            placement.placed(jnp.array(arrays[str(i)].reshape(leaf.shape)), leaf)
            for i, leaf in enumerate(leaves)
        ]
        return body["step"], jax.tree.unflatten(structure, state), body["record"]

    def due(self) -> bool:
        """Whether a checkpoint is worth its time now."""
        return time.monotonic() - self._since >= self._wait

    def write(self, step: int, state: Any, record: Any) -> None:
        """Keeps the state after so many steps, and a JSON-able record."""
        began = time.monotonic()
        self._log.forget(f"state_{self._slot}")  # two states at most are on disk
        arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        self._log.write(f"state_{self._slot}", arrays, {"step": step, "record": record})
        self._slot, self._since = 1 - self._slot, time.monotonic()
        # So that writing takes 5 % of the time.
        self._wait = max(_SECONDS, (self._since - began) / _SHARE)
