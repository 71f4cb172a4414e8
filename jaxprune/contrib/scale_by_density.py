"""Larger steps for sparser matrices, so that a dense model's learning rate serves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.rules import is_between
from jaxprune.training.masked import require_params
from jaxprune.typing import Params, PrunableLike


def scale_by_density(
    power: float = 0.75, *, prunable: PrunableLike = leaves.prunable
) -> optax.GradientTransformationExtraArgs:
    """Divides the updates of each leaf by its density, to a power.

    Of a matrix of which a share d of the weights is left, an output adds up d as many
    changes of a step. Where these point one way, it changes d times as much as that of
    the dense matrix, where they are independent d^(1/2) times. Divided by that, the
    step is as large as the dense one, and the learning rate that was found for the
    dense model serves a model that is sparse from the start. It goes behind Adam,
    inside what masks:

      jp.gradual(optax.chain(optax.adamw(rate), jp.contrib.scale_by_density()), ...)

    Args:
      power: 0.5 for independent changes, 1 for those that point one way. 0.75 was
        best for SET in GPTs of two sizes.
      prunable: which leaves' updates are divided, a function of leaf name and leaf.

    Returns:
      A transformation without a state, which counts the zeros of the parameters: a
      weight that has just come back is one for a step. A leaf of zeros alone is left as
      it is, and a stack of layers has one density.

    Raises:
      ValueError: the power is not in [0, 1]; at `update`: no parameters, or a glob that
        matches none of them.

    Example:
      >>> params = {"w": jnp.zeros((4, 4)).at[0, 0].set(1.0)}
      >>> tx = scale_by_density()
      >>> updates, _ = tx.update({"w": jnp.ones((4, 4))}, tx.init(params), params)
      >>> updates["w"][0].tolist()
      [8.0, 8.0, 8.0, 8.0]

    Reference:
      Dey et al., "Sparse maximal update parameterization: A holistic approach to sparse
      training dynamics", 2024, arXiv 2405.15743: Adam's rate of a sparse matrix over
      its density (power 1), with initial weights over its root, which is the caller's.
    """
    if not is_between(power, 0, 1):
        raise ValueError(f"scale_by_density needs a power in [0, 1], got {power}")
    leaves.as_rule(prunable)  # its globs are looked for when there are names

    def update(updates: optax.Updates, params: Params | None = None) -> optax.Updates:
        named = tree.named_leaves(require_params(params, "scale_by_density"))
        rule = leaves.checked_rule(prunable, list(named))
        scaled = [
            _scaled(update, named[name], power)
            if not tree.is_excluded(update) and rule(name, named[name])
            else update
            for name, update in tree.named_leaves(updates).items()
        ]
        structure = jax.tree.structure(updates, is_leaf=tree.is_excluded)
        return jax.tree.unflatten(structure, scaled)

    return optax.with_extra_args_support(optax.stateless(update))


def _scaled(update: jax.Array, leaf: jax.Array, power: float) -> Any:
    # By rows: 32 bits do not count the weights of every leaf.
    rows = jnp.count_nonzero(jnp.atleast_1d(leaf), axis=-1)
    kept = jnp.sum(rows, dtype=jnp.float32)
    density = jnp.where(kept == 0, 1.0, kept / float(leaf.size))
    wide = np.promote_types(update.dtype, np.float32)
    return (update.astype(wide) / (density**power).astype(wide)).astype(update.dtype)
