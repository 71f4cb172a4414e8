"""The leaves of a checkpoint: their names, and which of them can be stored."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.manifest import LISTED
from jaxprune.arrays import rules
from jaxprune.arrays.rules import Rule

_NOT_STORED = ("uint2", "uint4")
_LEAF = (
    Rule(
        lambda v: hasattr(v.leaf, "shape") and hasattr(v.leaf, "dtype"),
        "a checkpoint holds arrays only, got {type} at '{name}'",
        "wrap it in jnp.asarray",
        error=TypeError,
    ),
    Rule(
        lambda v: not jnp.issubdtype(v.leaf.dtype, jax.dtypes.prng_key),
        "a checkpoint holds no typed random keys, got one at '{name}'",
        "store jax.random.key_data(key) and wrap it again after loading",
        error=TypeError,
    ),
    Rule(
        lambda v: np.dtype(v.leaf.dtype).name not in _NOT_STORED,
        "a checkpoint holds no {leaf.dtype}, which tensorstore has not, got one at "
        "'{name}'",
        "cast it to uint8",
        error=TypeError,
    ),
    Rule(
        lambda v: v.name not in v.named,
        "a checkpoint stores leaves by name, got two named '{name}'",
        "rename one",
    ),
)
_GLOBAL = Rule(
    lambda v: not v.local,
    "several processes save arrays on a mesh of all of them, got {local} on one "
    "process's devices",
    "place the state with `out_shardings`, `device_mesh.state_shardings` gives them",
)


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
        rules.check(
            _LEAF, name=name, leaf=leaf, type=type(leaf).__name__, named=leaves.keys()
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
    rules.check([_GLOBAL], local=", ".join(local[:LISTED]))
