"""What weights see: statistics of the inputs of products, over calibration batches.

For each input feature the mean square, and on request the Hessian of the layer's
squared error, X^T X / n, in float32. Products that share an input share its statistics.
Sums run over the positions that count, all of them unless the caller says otherwise; a
sequence's first token (BOS) counts too.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import placement, tree
from jaxprune.arrays.lazy import Leaves
from jaxprune.graph.linear_ops import Input, Product, Trace, trace
from jaxprune.graph.segments import Stage, Stages
from jaxprune.typing import Params, Prunable

# Hessians are halved down to blocks of so many inputs; those under the diagonal are
# never made.
_BLOCK = 512


class Moments(NamedTuple):
    """The second moments of one input.

    Attributes:
      samples: over how many positions, float32 scalar.
      mean_square: (batch, in) float32: the mean of each feature's square.
      hessian: (batch, in, in) float32: X^T X / samples; None where not asked for.
    """

    samples: jax.Array
    mean_square: jax.Array
    hessian: jax.Array | None


def calibrate(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    hessian: bool = False,
    positions: Callable[[Any], jax.Array] | None = None,
    prunable: Prunable = tree.prunable,
) -> dict[str, Moments]:
    """The statistics of every product's input, over batches, by the dense model.

    One batch is in memory at a time. Batches of another shape are traced anew.

    Args:
      fn: parameters and a batch to anything.
      params: the parameters; `jp.LazyArray` leaves are read anew for each batch.
      batches: pytrees of arrays.
      hessian: whether to add up X^T X as well, in^2 floats for each input.
      positions: a batch to booleans of the shape of the samples, (batch, time) say:
        which positions count. None counts all.
      prunable: which leaves are of interest.

    Returns:
      Name of the weight to its input's moments; of a weight used more than once, over
      all uses that see it the same way.

    Raises:
      ValueError: there is no batch or no product, an input is not finite, or positions
        do not have the shape of an input's samples.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: x @ params["w"]
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> jp.calibrate(fn, {"w": jnp.ones((2, 3))}, batches)["w"].mean_square.tolist()
      [[5.0, 2.0]]
    """
    planned: dict[Any, Stages] = {}
    sums: dict[str, Moments] = {}
    for batch in batches:
        kind = kinds(batch)
        if kind not in planned:
            traced = trace(fn, params, batch)
            products = chosen(traced, params, prunable)
            leaves = Leaves(jax.tree.leaves(params))
            planned[kind] = Stages(traced, leaves, products)
        _add_batch(sums, planned[kind], batch, hessian=hessian, positions=positions)
    if not planned:
        raise ValueError("calibrate needs at least one batch, got none")
    done: dict[int, Moments] = {}
    for name, total in sums.items():
        if id(total) not in done:
            done[id(total)] = finished(total, name)
    return {name: done[id(total)] for name, total in sums.items()}


def _add_batch(
    sums: dict[str, Moments],
    stages: Stages,
    batch: Any,
    *,
    hessian: bool,
    positions: Callable[[Any], jax.Array] | None,
) -> None:
    live = stages.start(batch)
    count = None if positions is None else positions(batch)
    for number, stage in enumerate(stages.stages):
        value, live = stages.run(stage, live, stages.fixed(stage))
        weights = counted(stage, count)
        for names in stages.sharing(stage):
            total = add(sums.get(names[0]), stage.source, value, weights, hessian)
            sums.update(dict.fromkeys(names, total))
        for i in stages.done(number):
            stages.leaves.forget(i)


def kinds(batch: Any) -> Any:
    """Structure, shapes and dtypes of a batch, to compare."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)


def chosen(traced: Trace, params: Params, prunable: Prunable) -> list[Product]:
    """The products whose weights may be pruned.

    Args:
      traced: the function's products.
      params: the parameters.
      prunable: which leaves may be pruned.

    Returns:
      Products, in order.

    Raises:
      ValueError: there is none.
    """
    named = tree.named_leaves(params)
    found = [p for p in traced.products if prunable(p.leaf, named[p.leaf])]
    first = {p.name: p.view for p in found if p.use == 0}
    # Another use of a tied weight counts where it sees the weight the same way.
    found = [p for p in found if p.view == first[p.name]]
    if not found:
        raise ValueError(
            "some product of a prunable leaf with an activation must be seen, but "
            f"there is none; seen are {sorted({p.leaf for p in traced.products})[:6]}, "
            f"unseen {dict(list(traced.unseen.items())[:6])}; give prunable=lambda "
            "name, leaf: ..., or write the product so that the leaf goes into it as it "
            "is"
        )
    return found


def counted(stage: Stage, count: jax.Array | None) -> jax.Array | None:
    """Which samples of a stage's input count, (samples,).

    Args:
      stage: the stage.
      count: booleans of the samples' shape, or None for all.

    Returns:
      float32 (samples,), or None.

    Raises:
      ValueError: the shapes differ.
    """
    if count is None:
        return None
    leading = stage.source.leading
    if math.prod(leading) != count.size or leading[: count.ndim] != count.shape:
        raise ValueError(
            f"positions must have the shape of the samples of each input, but that of "
            f"'{stage.products[0].name}' has samples {leading} and positions are "
            f"{count.shape}; leave such weights out with prunable=..., or positions"
        )
    return jnp.ravel(count).astype(np.float32)


def add(
    before: Moments | None,
    source: Input,
    value: jax.Array,
    weights: jax.Array | None,
    hessian: bool,
) -> Moments:
    """Sums with one more batch in them.

    Args:
      before: sums so far; their memory may be reused.
      source: how the input is read.
      value: the value it is read from.
      weights: 1 for samples that count, 0 for others, (samples,); None counts all.
      hessian: whether X^T X is added up.

    Returns:
      Sums, not yet divided by the count.
    """
    batch, _, inputs = source.shape
    if before is None:
        # On one device there at once, or they would be added up by two programs.
        where = getattr(value, "sharding", None)
        where = where if where and len(where.device_set) == 1 else None
        zeros = functools.partial(jnp.zeros, dtype=np.float32, device=where)
        wide = zeros((batch, inputs, inputs)) if hessian else None
        before = Moments(zeros(()), zeros((batch, inputs)), wide)
    return placement.automatic(
        lambda *arrays: _added(*arrays, source), before, value, weights
    )


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _added(
    sums: Moments, value: jax.Array, weights: jax.Array | None, source: Input
) -> Moments:
    x = source.read(value).astype(np.float32)  # (batch, samples, in)
    samples = jnp.asarray(x.shape[1], np.float32)
    if weights is not None:
        counts = weights[None, :, None] > 0
        x, samples = jnp.where(counts, x, np.float32(0)), weights.sum()
    square, hessian = sums.mean_square, sums.hessian
    if hessian is None:
        square = square + jnp.square(x).sum(1)
    else:
        hessian = _upper(hessian, x, 0, x.shape[2])
    return Moments(sums.samples + samples, square, hessian)


def _upper(hessian: jax.Array, x: jax.Array, start: int, stop: int) -> jax.Array:
    """Adds X^T X of some inputs to the Hessian, on and above its diagonal."""
    if stop - start <= _BLOCK:
        own = x[:, :, start:stop]
        return hessian.at[:, start:stop, start:stop].add(_product(own, own))
    half = (start + stop) // 2
    corner = _product(x[:, :, start:half], x[:, :, half:stop])
    hessian = hessian.at[:, start:half, half:stop].add(corner)
    return _upper(_upper(hessian, x, start, half), x, half, stop)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("bsi,bsj->bij", x, y, precision="highest")


def finished(sums: Moments, name: str) -> Moments:
    """Means from sums.

    Args:
      sums: what `add` gave.
      name: the weight, for the error.

    Returns:
      The moments; the Hessian is symmetric.

    Raises:
      ValueError: the input is not finite, or no position counts.
    """
    moments = placement.automatic(_divided, sums)
    if not (np.isfinite(moments.mean_square).all() and float(sums.samples) > 0):
        raise ValueError(
            f"the input of '{name}' must be finite and some position must count, but "
            "it is not or none does; look for NaN or overflow in the model's forward "
            "pass on these batches (float32 in place of float16 may help)"
        )
    return moments


@jax.jit
def _divided(sums: Moments) -> Moments:
    scale = 1 / sums.samples
    hessian = sums.hessian
    if hessian is not None:
        upper = jnp.triu(hessian) * scale
        hessian = upper + jnp.swapaxes(jnp.triu(hessian, 1) * scale, 1, 2)
        return Moments(sums.samples, jnp.diagonal(upper, axis1=1, axis2=2), hessian)
    return Moments(sums.samples, sums.mean_square * scale, None)
