"""The squared gradients of a trained model's own loss, over calibration batches.

For checkpoints of which no optimizer state is left: what `jp.track_gradients` averages
over training, at the trained weights. The criteria `scores.obd` and `scores.trajectory`
take it.
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
from jaxprune.leaves import check_rule
from jaxprune.typing import Importance, Params, Prunable


def calibrate_gradients(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[Any],
    *,
    prunable: Prunable = leaves.prunable,
) -> Importance:
    """The mean over batches of the squared gradient of a loss, E[g^2].

    Each batch's gradient is squared as a whole: small batches tell more than few large
    ones. Memory holds the parameters, one gradient and the sums, of the prunable leaves
    alone; the host waits once, at the end. Batches of another shape compile anew.

    Args:
      loss: parameters and a batch to one floating number, a mean over the batch.
      params: the parameters, any pytree of arrays, sharded or not; `jp.LazyArray`
        leaves are all read to memory.
      batches: pytrees of arrays, one in memory at a time.
      prunable: which leaves are of interest.

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
      >>> found = jp.contrib.calibrate_gradients(loss, {"w": jnp.ones((2, 1))}, batches)
      >>> found.square["w"].tolist()
      [[5.0], [2.0]]
    """
    params = lazy.loaded(params)
    named = tree.named_leaves(params)
    structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
    own = {name: named[name] for name in _taken(named, prunable)}
    rest = {name: leaf for name, leaf in named.items() if name not in own}

    def value(own: dict[str, Any], rest: dict[str, Any], batch: Any) -> jax.Array:
        joined = [own[name] if name in own else rest[name] for name in named]
        return _one_number(loss(jax.tree.unflatten(structure, joined), batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def added(
        sums: dict[str, jax.Array], own: Any, rest: Any, batch: Any
    ) -> dict[str, jax.Array]:
        gradient = jax.grad(value)(own, rest, batch)
        squares = {k: jnp.square(g.astype(np.float32)) for k, g in gradient.items()}
        return {k: placement.placed(sums[k] + squares[k], own[k]) for k in own}

    sums = {name: placement.zeros_like(leaf, np.float32) for name, leaf in own.items()}
    count = 0
    for batch in batches:
        sums = added(sums, own, rest, batch)
        count += 1
    if not count:
        raise ValueError("calibrate_gradients needs at least one batch, got none")
    _check_finite(sums)
    means = {name: total / count for name, total in sums.items()}
    found = [means.get(name, MaskedNode()) for name in named]
    return Importance(square=jax.tree.unflatten(structure, found))


def _taken(named: Mapping[str, Any], prunable: Prunable) -> list[str]:
    """The names of the leaves of interest, which have values."""
    check_rule(prunable, list(named))
    taken = [
        name
        for name, leaf in named.items()
        if not tree.is_excluded(leaf) and prunable(name, leaf)
    ]
    if not taken:
        raise ValueError(
            f"some leaf must be prunable, but none of {listed(named)} is; give "
            "prunable=lambda name, leaf: ... that is True for the leaves of interest"
        )
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if wrong := [k for k, leaf in named.items() if isinstance(leaf, abstract)]:
        raise ValueError(
            f"the parameters must be arrays with values, but {listed(wrong)} are not; "
            "call calibrate_gradients outside of jit"
        )
    return taken


def _one_number(value: Any) -> jax.Array:
    """The loss itself, if it is one floating number."""
    kind = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), value)
    single = isinstance(value, jax.Array) and value.shape == ()
    if not (single and jnp.issubdtype(value.dtype, jnp.floating)):
        raise ValueError(
            "the loss must be one floating number, the mean over a batch, but it is "
            f"{kind} (shape, dtype); give lambda params, batch: ... that returns the "
            "training loss and not the model's outputs"
        )
    return value


def _check_finite(sums: Mapping[str, jax.Array]) -> None:
    """Refuses sums that are not finite, all by name; the host waits here."""
    finite = jax.device_get({k: jnp.all(jnp.isfinite(x)) for k, x in sums.items()})
    if wrong := [name for name, good in finite.items() if not good]:
        raise ValueError(
            f"squared gradients must be finite, but those of {listed(wrong)} are not; "
            "look for NaN in the parameters or batches, or for overflow (float32 in "
            "place of float16 may help)"
        )
