"""The checkpoints of a training run, by orbax.

orbax writes a step beside its place, renames it when it is whole, on all processes at
once, and places what it loads: what four devices saved loads onto two. Leaves are
stored by number, so containers (NamedTuple, dict, NNX state, `optax.MaskedNode()`)
come from the target that is restored onto.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxprune.files import atomic

# Of a repeated leaf each replica would write a slice, and each slice of each shape is a
# program to compile: hundreds at the first save of a small model.
_SMALLEST_SLICE = 2**20

# orbax warns of what is normal; its errors are raised anyway.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoint(NamedTuple):
    """A whole checkpoint.

    Attributes:
      step: steps that were done when it was saved.
      state: a tree like the target, with its containers and shardings.
    """

    step: int
    state: Any


def save(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    step: int,
    configuration: Mapping[str, Any],
) -> None:
    """Saves a tree of arrays; the two newest checkpoints stay.

    Returns when the checkpoint is whole on disk, so the state may be donated to the
    next step at once. All processes of a distributed run call it together, on a
    directory that they share.

    Args:
      directory: directory of checkpoints alone; made when it is missing.
      state: tree of JAX or NumPy arrays.
      step: steps that were done; grows from save to save.
      configuration: settings that a resumed run must agree with, JSON-able.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> directory, state = tempfile.mkdtemp(), {"w": jnp.ones(3)}
      >>> save(directory, state, step=10, configuration={"seed": 0})
      >>> restore(directory, state, configuration={"seed": 0}).step
      10
    """
    with _checkpointer(directory) as checkpointer:
        checkpointer.save(step, _by_number(state), custom_metadata=dict(configuration))


def restore(
    directory: str | os.PathLike[str],
    abstract_state: Any,
    *,
    configuration: Mapping[str, Any] | None = None,
) -> Checkpoint | None:
    """Loads the newest checkpoint of a directory, or None where there is none.

    All processes of a distributed run call it together.

    Args:
      directory: directory that `save` was given.
      abstract_state: tree like the one saved, of arrays or `jax.ShapeDtypeStruct`; each
        leaf is placed by its `sharding`.
      configuration: settings of this run; None compares none.

    Returns:
      The checkpoint.

    Raises:
      ValueError: it was saved with other settings, or its leaves have other shapes.
    """
    if not Path(directory).is_dir():
        return None
    target = jax.tree.map(_placed, abstract_state)
    with _checkpointer(directory) as checkpointer:
        if (latest := checkpointer.latest) is None:
            return None
        before = checkpointer.metadata(latest).custom_metadata or {}
        now = before if configuration is None else configuration
        if different := atomic.differences(before, now):
            raise ValueError(
                f"'{directory}' must be of the same configuration, but "
                f"{'; '.join(different)}; give the old values, or another directory"
            )
        loaded = checkpointer.load(latest, _by_number(target))
    leaves, structure = jax.tree.flatten(target)
    state = [
        # orbax stores no array without elements, so those are the target's.
        loaded[str(index)] if leaf.size else _empty(leaf)
        for index, leaf in enumerate(leaves)
    ]
    return Checkpoint(latest.step, jax.tree.unflatten(structure, state))


def _placed(leaf: Any) -> Any:
    """What orbax loads onto: in NumPy, by the sharding, or on the default device."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = leaf.sharding or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)


def _by_number(tree: Any) -> dict[str, Any]:
    # A tree without leaves is none that orbax stores, hence the constant.
    leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(tree)) if x.size}
    return {"format": np.zeros(()), **leaves}


def _checkpointer(directory: str | os.PathLike[str]) -> ocp.training.Checkpointer:
    saving = ocp.options.ArrayOptions.Saving(
        min_slice_bytes_for_replica_parallel=_SMALLEST_SLICE
    )
    return ocp.training.Checkpointer(
        Path(directory).absolute(),
        context=ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)),
        # Every save is asked for by the training loop.
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )
