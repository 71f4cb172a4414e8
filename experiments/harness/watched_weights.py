"""Single weights that a run follows through training, to be drawn afterwards."""

from typing import Any

import jax
import numpy as np

import jaxprune as jp
from jaxprune.arrays import processes
from jaxprune.arrays.low_bit import is_int8
from jaxprune.typing import Prunable

WATCHED_WEIGHTS = 64


def sampled_weights(
    params: Any, seed: int, prunable: Prunable
) -> list[tuple[int, int]]:
    """(leaf, flat index) of `WATCHED_WEIGHTS` weights, spread evenly over leaves."""
    rng = np.random.default_rng(seed)
    leaves = jp.tree.named_leaves(params)
    fitting = [
        i for i, (name, leaf) in enumerate(leaves.items()) if prunable(name, leaf)
    ]
    sizes = [leaf.size for leaf in leaves.values()]
    # Round the leaves, not by their size: the largest would have nearly all of them.
    chosen = [fitting[n % len(fitting)] for n in range(WATCHED_WEIGHTS)]
    return [(leaf, int(rng.integers(sizes[leaf]))) for leaf in sorted(chosen)]


def values(tree: Any, sampled: list[tuple[int, int]]) -> list[float]:
    """The sampled elements of a tree of booleans or floats, fetched all at once."""
    leaves = list(jp.tree.named_leaves(tree).values())
    places: dict[int, list[int]] = {}
    for leaf, index in sampled:
        places.setdefault(leaf, []).append(index)
    indices = [
        np.unravel_index(positions, leaves[i].shape) for i, positions in places.items()
    ]
    # One program and one transfer: a fetch for each weight would stop every look.
    picked = _picked([leaves[i] for i in places], indices)
    return np.concatenate(processes.fetch(picked)).tolist()


@jax.jit
def _picked(leaves: list[Any], indices: list[Any]) -> list[jax.Array]:
    """The elements of each leaf at its own indices."""
    arrays = [jp.low_bit.decode(leaf) if is_int8(leaf) else leaf for leaf in leaves]
    return [leaf[positions] for leaf, positions in zip(arrays, indices, strict=True)]
