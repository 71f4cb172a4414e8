"""Single weights that a run follows through training, to be drawn afterwards."""

from typing import Any

import numpy as np

import jaxprune as jp
from experiments.harness import device_mesh
from jaxprune.arrays.low_bit import is_int8
from jaxprune.typing import Prunable

WATCHED_WEIGHTS = 64


def sampled_weights(
    params: Any, seed: int, prunable: Prunable
) -> list[tuple[int, int]]:
    """(leaf, flat index) of some weights, spread evenly over the leaves.

    Args:
      params: the parameters.
      seed: decides which.
      prunable: the leaves that they may be of.

    Returns:
      `WATCHED_WEIGHTS` pairs, by leaf.
    """
    rng = np.random.default_rng(seed)
    named = jp.tree.named_leaves(params)
    fitting = [
        i for i, (name, leaf) in enumerate(named.items()) if prunable(name, leaf)
    ]
    sizes = [leaf.size for leaf in named.values()]
    chosen = [fitting[n % len(fitting)] for n in range(WATCHED_WEIGHTS)]
    return [(leaf, int(rng.integers(sizes[leaf]))) for leaf in sorted(chosen)]


def values(tree: Any, sampled: list[tuple[int, int]]) -> list[float]:
    """The sampled elements of a tree, fetched at once and nothing else.

    Args:
      tree: like the parameters, booleans or floats.
      sampled: what `sampled_weights` gave.

    Returns:
      One number each, in order.
    """
    picked = []
    for number, leaf in enumerate(jp.tree.named_leaves(tree).values()):
        indices = [index for owner, index in sampled if owner == number]
        if indices:
            held = jp.low_bit.decode(leaf) if is_int8(leaf) else leaf
            picked.append(held[np.unravel_index(indices, leaf.shape)])
    return np.concatenate(device_mesh.fetch(picked)).tolist()
