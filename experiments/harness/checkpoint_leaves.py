"""The leaves of a checkpoint: their names, and which of them can be stored."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.manifest import LISTED

_NOT_STORED = ("uint2", "uint4")


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, refusing what orbax does not store.

    Args:
      tree: tree of arrays, or of `jax.ShapeDtypeStruct`.

    Returns:
      Name to leaf, in the order of the tree.

    Raises:
      TypeError: a leaf is no array, or of a dtype that cannot be stored.
      ValueError: two leaves have one name.
    """
    leaves: dict[str, Any] = {}
    # None and `optax.MaskedNode()` have no leaves, so they come from the target alone.
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"a checkpoint holds arrays only, got {type(leaf).__name__} at "
                f"'{name}'; wrap it in jnp.asarray"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"a checkpoint holds no typed random keys, got one at '{name}'; store "
                "jax.random.key_data(key) and wrap it again after loading"
            )
        if np.dtype(leaf.dtype).name in _NOT_STORED:
            raise TypeError(
                f"a checkpoint holds no {leaf.dtype}, which tensorstore has not, got "
                f"one at '{name}'; cast it to uint8"
            )
        if name in leaves:
            raise ValueError(
                f"a checkpoint stores leaves by name, got two named '{name}'; rename "
                "one"
            )
        leaves[name] = leaf
    return leaves


def check_global(leaves: Mapping[str, Any]) -> None:
    """Refuses arrays that each process has for itself, since orbax saves none.

    Args:
      leaves: name to array, as `by_name` gives them.

    Raises:
      ValueError: a leaf is on the devices of one of several processes.
    """
    if jax.process_count() == 1:  # every array is addressable
        return
    local = [
        repr(name)
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    ]
    if local:
        raise ValueError(
            "several processes save arrays on a mesh of all of them, got "
            f"{', '.join(local[:LISTED])} on one process's devices; place the state "
            "with `out_shardings`, `device_mesh.state_shardings` gives them"
        )
