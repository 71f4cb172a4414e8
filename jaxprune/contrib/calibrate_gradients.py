"""The squared gradients of a trained model's own loss, over calibration batches.

For checkpoints of which no optimizer state is left: what `jp.track_gradients` averages
over training, at the trained weights. The criteria `scores.obd` and
`scores.preconditioned_magnitude` take it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import MaskedNode

from jaxprune import leaves
from jaxprune.arrays import lazy, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import Rule, check
from jaxprune.leaves import checked_rule
from jaxprune.typing import Importance, Params, PrunableLike


def calibrate_gradients(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[Any],
    *,
    prunable: PrunableLike = leaves.prunable,
) -> Importance:
    """The mean over batches of the squared gradient of a loss, E[g^2].

    Each batch's gradient is squared as a whole: small batches tell more than few large
    ones. Memory holds the parameters, one gradient and the sums, of the prunable leaves
    alone; the host waits once, at the end. Batches of another shape compile anew.

    Args:
      loss: function of the parameters and a batch; one floating number, a mean over
        the batch.
      params: parameters, any pytree of arrays, sharded or not; `jp.LazyArray`
        leaves are all read to memory.
      batches: pytrees of arrays, one in memory at a time.
      prunable: which leaves are of interest, a function of leaf name and leaf.

    Returns:
      An importance with `square`: float32, of the parameters' shapes and sharding;
      leaves that are not prunable are `optax.MaskedNode()`.

    Raises:
      ValueError: there is no batch or no prunable leaf, a leaf has no values, the loss
        is not one floating number, or a square is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> params = {"w": jnp.ones((2, 1))}
      >>> importance = jp.contrib.calibrate_gradients(loss, params, batches)
      >>> importance.square["w"].tolist()
      [[5.0], [2.0]]
    """
    params = lazy.loaded(params)
    named = tree.named_leaves(params)
    structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
    names = _prunable_names(named, prunable)
    pruned = {name: named[name] for name in names}
    fixed = {name: leaf for name, leaf in named.items() if name not in pruned}

    def loss_of(pruned: Any, fixed: Any, batch: Any) -> jax.Array:
        named_leaves = pruned | fixed
        leaves = [named_leaves[name] for name in named]  # in flattening order
        return _one_number(loss(jax.tree.unflatten(structure, leaves), batch))

    # The sums are donated, and the fixed leaves are no constants of the program: on the
    # device there is one copy of each.
    @functools.partial(jax.jit, donate_argnums=0)
    def add_squares(
        sums: dict[str, jax.Array], pruned: Any, fixed: Any, batch: Any
    ) -> dict[str, jax.Array]:
        gradient = jax.grad(loss_of)(pruned, fixed, batch)
        # In two bytes the square of a small gradient would be zero.
        squares = {k: jnp.square(g.astype(np.float32)) for k, g in gradient.items()}
        return {k: placement.placed(sums[k] + squares[k], pruned[k]) for k in pruned}

    sums = {
        name: placement.zeros_like(leaf, np.float32) for name, leaf in pruned.items()
    }
    count = 0
    for batch in batches:
        sums = add_squares(sums, pruned, fixed, batch)
        count += 1
    _check_sums(sums, count)
    means = {name: total / count for name, total in sums.items()}
    square = [means.get(name, MaskedNode()) for name in named]
    return Importance(square=jax.tree.unflatten(structure, square))


def _prunable_names(named: Mapping[str, Any], prunable: PrunableLike) -> list[str]:
    """The names of the leaves of interest, which have values."""
    rule = checked_rule(prunable, list(named))
    names = [
        name
        for name, leaf in named.items()
        if not tree.is_excluded(leaf) and rule(name, leaf)
    ]
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    no_values = listed(k for k, leaf in named.items() if isinstance(leaf, abstract))
    shapeless = listed(k for k, leaf in named.items() if not _is_array(leaf))
    # The squares of integers' gradients, or of half a complex number, say nothing.
    others = listed(
        k for k in names if _is_array(named[k]) and not tree.is_floating(named[k])
    )
    check(
        _LEAVES,
        names=names,
        known=listed(named),
        no_values=no_values,
        shapeless=shapeless,
        others=others,
    )
    return names


def _is_array(leaf: Any) -> bool:
    number = isinstance(leaf, int | float | complex)
    return number or tree.is_excluded(leaf) or hasattr(leaf, "dtype")


def _one_number(value: Any) -> jax.Array:
    """The loss itself, if it is one floating number."""
    signature = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), value)
    single = isinstance(value, jax.Array) and value.shape == ()
    floating = single and jnp.issubdtype(value.dtype, jnp.floating)
    check(_LOSS, floating=floating, signature=signature)
    return value


def _check_sums(sums: Mapping[str, jax.Array], count: int) -> None:
    """Refuses no batches, and sums that are not finite; the host waits here."""
    finite = jax.device_get({k: jnp.all(jnp.isfinite(x)) for k, x in sums.items()})
    infinite = listed(name for name, is_finite in finite.items() if not is_finite)
    check(_SUMS, count=count, infinite=infinite)


_LEAVES = [
    Rule(
        lambda v: len(v.names) > 0,
        "some leaf must be prunable, but none of {known} is",
        "give prunable=lambda name, leaf: ... that is True for the leaves of interest",
    ),
    Rule(
        lambda v: not v.no_values,
        "the parameters must be arrays with values, but {no_values} are not",
        "call calibrate_gradients outside of jit",
    ),
    Rule(
        lambda v: not v.shapeless,
        "the parameters must be arrays, but {shapeless} are not",
        "part an Equinox model first: eqx.partition(model, eqx.is_inexact_array)",
    ),
    Rule(
        lambda v: not v.others,
        "leaves of interest must be floating, but {others} are not",
        "leave them out with prunable=",
    ),
]
_LOSS = [
    Rule(
        lambda v: v.floating,
        "the loss must be one floating number, the mean over a batch, but it is "
        "{signature} (shape, dtype)",
        "give lambda params, batch: ... that returns the training loss and not the "
        "model's outputs",
    )
]
_SUMS = [
    Rule(
        lambda v: v.count > 0,
        "calibrate_gradients needs at least one batch, got none",
    ),
    Rule(
        lambda v: not v.infinite,
        "squared gradients must be finite, but those of {infinite} are not",
        "look for NaN in the parameters or batches, or for overflow (float32 in place "
        "of float16 may help)",
    ),
]
