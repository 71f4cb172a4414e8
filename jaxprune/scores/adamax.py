"""Adamax's state told from Adam's, whose type it has, by one step of the optimizer.

Adamax keeps a maximum of |g| where Adam has the mean of g^2, so it grows in proportion
to the gradient and not to its square. A state does not say so, a step does: two numbers
in the place of each leaf are enough, of which the second has twice the gradient.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.arrays import tree
from jaxprune.typing import Params

# Small, so that hardly any clipping changes it; its square is no subnormal number.
_GRADIENT = 2.0**-10


class AdamaxState(NamedTuple):
    """Adamax's moments, by a name of their own.

    Attributes:
      count: number of steps, int32 scalar.
      mu: first moments, like the parameters.
      nu: maxima of |g|, like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # as optax names it
    mu: Params
    nu: Params

    @property
    def importance_fields(self) -> tuple[str, ...]:
        """None: a maximum of |g| is no mean of g^2."""
        return ()

    @property
    def why_no_square(self) -> str:
        """What this optimizer has in the place of E[g^2]."""
        return "Adamax keeps a maximum of |g|"


def name_adamax(
    optimizer: optax.GradientTransformation, state: optax.OptState, params: Params
) -> optax.OptState:
    """The state, in which what is Adamax's is an `AdamaxState`.

    Args:
      optimizer: optimizer whose state it is. It is asked for one step of two numbers a
        leaf, if its state has nodes of Adam's type.
      state: state of the optimizer.
      params: parameters, of which only the containers and numbers of axes are read.

    Returns:
      A state of the same leaves.
    """
    nodes = jax.tree.leaves(state, is_leaf=has_adams_type)
    if not any(map(has_adams_type, nodes)):
        return state
    maxima = iter(_are_maxima(optimizer, params))

    def renamed(node: Any) -> Any:
        if has_adams_type(node) and next(maxima, False):
            return AdamaxState(node.count, node.mu, node.nu)
        return node

    return jax.tree.map(renamed, state, is_leaf=has_adams_type)


def has_adams_type(node: Any) -> bool:
    """Whether a node of a state is Adam's, or one of the kind that shares its type."""
    return isinstance(node, optax.ScaleByAdamState)


def _are_maxima(optimizer: optax.GradientTransformation, params: Params) -> list[bool]:
    """Of each node of Adam's type, whether a step moves `nu` as the gradient.

    Nothing is known of what does not step: an optimizer that needs more than gradient,
    parameters and the loss's value, or one that waits for several gradients.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    try:
        # With values in `jit` too; the optimizer's warnings are for its real steps.
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zeros, gradients = pairs_like(params)
            _, state = optimizer.update(
                gradients, optimizer.init(zeros), zeros, value=0.0
            )
            nodes = jax.tree.leaves(state, is_leaf=has_adams_type)
            return [is_linear(node.nu) for node in nodes if has_adams_type(node)]
    except Exception:  # whatever an optimizer says of leaves that are not the model's
        return []


def pairs_like(params: Params) -> tuple[Params, Params]:
    """Two numbers in the place of each leaf: zeros, and a gradient and its double."""

    def leaves(first: float) -> Params:
        return jax.tree.map(lambda leaf: _pair(leaf, first), params)

    return leaves(0.0), leaves(_GRADIENT)


def _pair(leaf: Any, first: float) -> Any:
    """A number and its double with as many axes as a leaf, zeros if not floating."""
    if not tree.is_floating(leaf):
        return leaf
    shape = (1,) * (leaf.ndim - 1) + (2,) * (leaf.ndim > 0)
    scale = np.arange(1.0, 3.0, dtype=np.float32) if leaf.ndim else np.float32(1)
    return jnp.asarray((first * scale).reshape(shape), jnp.float32)


def is_linear(nu: Params) -> bool:
    """Whether the second number of a leaf is twice the first, and not four times."""
    pairs = [np.ravel(leaf) for leaf in jax.tree.leaves(nu) if np.size(leaf) == 2]
    moved = [second / first for first, second in pairs if first > 0]
    return bool(moved) and max(moved) < 3 and min(moved) > 1.5
