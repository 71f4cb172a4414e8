"""The weights of a job as matrices: how much of each goes, and how one is solved.

All that can be refused is refused before the walk begins, for all weights at once.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import allocate, meshes
from jaxprune.axes import Axes
from jaxprune.base import Params, Pattern
from jaxprune.calibration import Moments
from jaxprune.methods import Matrix, Method
from jaxprune.patterns import PerOutput, Unstructured
from jaxprune.shares import Shares, Uniform, Weight
from jaxprune.stored import Leaves, array
from jaxprune.tracing import Input, Product

# Samples that a weight's error is measured on.
_SEEN = 256


class Plan(NamedTuple):
    """What is done to which weight.

    Attributes:
      method: how a matrix is solved.
      pattern: which weights live and die together.
      sparsity: what was asked for.
      shares: how it was shared out.
      removed: name of the weight to the units that go from each of its matrices.
    """

    method: Method
    pattern: Pattern
    sparsity: float | Mapping[str, float] | None
    shares: Shares
    removed: dict[str, list[int]]

    def facts(self) -> dict[str, Any]:
        """What decides the result, JSON-able."""
        return {
            "method": repr(self.method),
            "pattern": repr(self.pattern),
            "sparsity": self.sparsity,
            "shares": type(self.shares).__name__,
            "removed": {name: sum(counts) for name, counts in self.removed.items()},
        }


def concrete(
    params: Params, products: Sequence[Product], *, donate: bool
) -> tuple[Leaves, dict[str, int]]:
    """The parameters' leaves, those to prune being finite arrays.

    Args:
      params: the parameters.
      products: of the weights to prune.
      donate: whether the old weights are given up; then no two leaves may be one.

    Returns:
      All leaves, in flattening order, and the fingerprints of those to prune.

    Raises:
      ValueError: a leaf to prune is abstract, traced or not finite, two weights
        overlap in their leaf, or a leaf to give up is used twice.
    """
    leaves = jax.tree.leaves(params)
    names = {p.leaf: p.view.leaf for p in products}
    traced = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if wrong := [k for k, i in names.items() if isinstance(leaves[i], traced)]:
        raise ValueError(
            f"the parameters must be arrays with values, but {wrong[:6]} are not; call "
            "prune_trained outside of jit"
        )
    seen = {name: _looked_at(leaves[i]) for name, i in names.items()}
    if wrong := [name for name, (finite, _) in seen.items() if not finite]:
        raise ValueError(
            f"the weights to prune must be finite, but {wrong[:6]} hold NaN or "
            "infinity; look for a damaged checkpoint"
        )
    uses = collections.Counter(map(id, leaves))
    if shared := [k for k, i in names.items() if donate and uses[id(leaves[i])] > 1]:
        raise ValueError(
            f"donate=True needs arrays that nothing else uses, but {shared[:6]} are "
            "other leaves as well; copy those with jnp.copy, or leave donate out"
        )
    _check_apart(products)
    return Leaves(leaves), {name: mark for name, (_, mark) in seen.items()}


def _check_apart(products: Sequence[Product]) -> None:
    """Refuses weights that are parts of one another."""
    by_leaf: dict[str, dict[str, Product]] = {}
    for product in products:
        by_leaf.setdefault(product.leaf, {})[product.name] = product
    for leaf, own in by_leaf.items():
        boxes = [(name, product.view.box) for name, product in own.items()]
        for i, (name, box) in enumerate(boxes):
            for other, second in boxes[:i]:
                apart = (
                    box is not None
                    and second is not None
                    and any(
                        a[1] <= b[0] or b[1] <= a[0]
                        for a, b in zip(box, second, strict=True)
                    )
                )
                if not apart:
                    raise ValueError(
                        f"each weight must be used as one part of its leaf, but "
                        f"'{name}' and '{other}' overlap; leave the leaf out with "
                        f"prunable=jp.tree.excluding('{leaf}')"
                    )


def planned(
    products: Sequence[Product],
    leaves: Leaves,
    method: Method,
    sparsity: float | Mapping[str, float] | None,
    pattern: Pattern | None,
    shares: Shares,
    moments: Callable[[], Mapping[str, Moments]],
) -> Plan:
    """Decides how much of each weight goes.

    Args:
      products: of the weights to prune.
      leaves: all of the parameters' leaves.
      method: how a matrix is solved.
      sparsity: the share to remove, or {glob: share}, or None.
      pattern: which weights live and die together, or None for the method's own.
      shares: how the sparsity is shared out.
      moments: gives the dense model's, called where the shares need them.

    Returns:
      The plan.

    Raises:
      ValueError: something does not fit; the sentence names the weights.
    """
    weights = {p.name: p for p in products if p.use == 0}
    pattern = method.pattern if pattern is None else pattern
    problems = [
        f"{why} at '{name}'"
        for name, p in weights.items()
        if (why := pattern.problem(p.shape[1:], Axes()))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; leave such weights out with "
            "prunable=jp.tree.excluding('...')"
        )
    for inputs, outputs in {p.shape[1:] for p in weights.values()}:
        _try(method, pattern, inputs, outputs)
    units = {name: _units(pattern, p) for name, p in weights.items()}
    if isinstance(sparsity, Mapping) or pattern.sparsity is not None:
        counts = _by_rule(sparsity, pattern, shares, units)
    else:
        counts = _by_shares(sparsity, pattern, shares, weights, units, leaves, moments)
    removed = {
        name: _spread(count, weights[name].shape[0])
        for name, count in zip(weights, counts, strict=True)
    }
    return Plan(method, pattern, sparsity, shares, removed)


def _try(method: Method, pattern: Pattern, inputs: int, outputs: int) -> None:
    """Lets a method refuse a pattern, by a call that computes nothing."""
    shapes = [(inputs, outputs), (inputs,), (inputs, inputs), ()]
    kinds = (np.float32, np.float32, np.float32, np.uint32)
    arrays = map(jax.ShapeDtypeStruct, shapes, kinds)
    jax.eval_shape(
        lambda w, m, h, r: method.prune(Matrix(w, m, h, r, pattern)), *arrays
    )


def _by_rule(
    sparsity: float | Mapping[str, float] | None,
    pattern: Pattern,
    shares: Shares,
    units: Mapping[str, int],
) -> list[int]:
    """Counts where a pattern or rules by name fix the shares."""
    fixed = pattern.sparsity
    if not isinstance(shares, Uniform):
        raise ValueError(
            f"shares={type(shares).__name__}(...) needs one sparsity and a pattern "
            f"that leaves it free, got sparsity={sparsity} and {pattern}; leave shares "
            "out"
        )
    if fixed is not None and sparsity is not None and sparsity != fixed:
        raise ValueError(
            f"{pattern} removes exactly {fixed:.4g} of each weight, but "
            f"sparsity={sparsity} was asked for; leave the sparsity out"
        )
    asked = sparsity if fixed is None else fixed
    return allocate.by_leaf(asked or 0.0, list(units), list(units.values()))


def _by_shares(
    sparsity: Any,
    pattern: Pattern,
    shares: Shares,
    weights: Mapping[str, Product],
    units: Mapping[str, int],
    leaves: Leaves,
    moments: Callable[[], Mapping[str, Moments]],
) -> list[int]:
    """Counts by a rule that shares out one sparsity."""
    if sparsity is None:
        raise ValueError(f"{pattern} leaves the sparsity free; give sparsity=0.5")
    allocate.checked(sparsity)
    seen = moments() if shares.needs_inputs else {}
    given = [
        Weight(
            p,
            functools.partial(_matrix, p, leaves),
            seen[name].mean_square if seen else None,
        )
        for name, p in weights.items()
    ]
    found = shares.of(given, float(sparsity))
    return [
        round(share * number)
        for share, number in zip(found, units.values(), strict=True)
    ]


def _matrix(product: Product, leaves: Leaves) -> jax.Array:
    return product.view.read(array(leaves.all[product.view.leaf]))


def _units(pattern: Pattern, product: Product) -> int:
    """How many units live or die in a weight."""
    batch, *matrix = product.shape
    if isinstance(pattern, Unstructured | PerOutput):
        return product.size
    scores = jax.ShapeDtypeStruct(tuple(matrix), np.float32)
    units = jax.eval_shape(functools.partial(pattern.units, axes=Axes()), scores)
    return batch * int(np.prod(units.shape))


def _spread(count: int, parts: int) -> list[int]:
    """A count as integers that differ by at most one, the larger ones first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def solve(
    plan: Plan, product: Product, weight: jax.Array, moments: Moments
) -> tuple[jax.Array, dict[str, Any]]:
    """Prunes one weight, expert by expert where there are several.

    Args:
      plan: what is done.
      product: which weight.
      weight: (batch, in, out), as stored.
      moments: of its input.

    Returns:
      The pruned weight in its own dtype, and its row of the report.

    Raises:
      ValueError: the Hessian could not be factorised.
    """
    counts = plan.removed[product.name]
    program = functools.partial(_solved, method=plan.method, pattern=plan.pattern)
    found = [
        meshes.automatic(program, weight, moments, np.int32(i), np.uint32(count))
        for i, count in enumerate(counts)
    ]
    after = found[0][0] if len(found) == 1 else jnp.concatenate([f[0] for f in found])
    damping = [float(f[2]) for f in found]
    if not np.isfinite(damping).all():
        raise ValueError(
            f"the Hessian of '{product.name}' must be positive definite, but could not "
            "be factorised with any damping; give more or other calibration batches, "
            "run the model in float32, or use method='wanda'"
        )
    removed = sum(int(f[1]) for f in found)
    return after, {
        "name": product.name,
        "shape": list(product.shape),
        "removed": sum(counts),
        "zeros": removed,
        "size": product.size,
        "damping": max(damping),
    }


@functools.partial(jax.jit, static_argnames=("method", "pattern"))
def _solved(
    weight: jax.Array,
    moments: Moments,
    i: jax.Array,
    removed: jax.Array,
    *,
    method: Method,
    pattern: Pattern,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrix i of a weight: pruned (1, in, out), its zeros, the damping used."""
    wide = weight[i].astype(np.float32)
    hessian = None if moments.hessian is None else moments.hessian[i]
    square = moments.mean_square[i]
    found = method.prune(Matrix(wide, square, hessian, removed, pattern))
    after = found.weight.astype(weight.dtype)
    zeros = jnp.sum(after == 0, dtype=np.uint32)
    return after[None], zeros, found.damping


def error(
    source: Input, value: jax.Array, before: jax.Array, after: jax.Array
) -> float:
    """The relative squared error of a weight's output: |X (W - V)|^2 / |X W|^2.

    Args:
      source: how the input is read.
      value: the value it is read from, of one batch; its first 256 samples are taken.
      before: W, (batch, in, out).
      after: V.

    Returns:
      At least 0; 0 where the output is zero anyway.
    """
    found = meshes.automatic(
        functools.partial(_error, source=source), value, before, after
    )
    return float(found)


@functools.partial(jax.jit, static_argnames="source")
def _error(
    value: jax.Array, before: jax.Array, after: jax.Array, *, source: Input
) -> jax.Array:
    x = source.read(value)[:, :_SEEN].astype(np.float32)
    wide = before.astype(np.float32)
    lost = jnp.einsum("bsi,bio->bso", x, wide - after.astype(np.float32))
    whole = jnp.einsum("bsi,bio->bso", x, wide)
    total = jnp.sum(jnp.square(whole))
    return jnp.sum(jnp.square(lost)) / jnp.where(total > 0, total, 1)


def fingerprints(names: Mapping[str, int], leaves: Leaves) -> dict[str, int]:
    """A number for the values of each leaf, to tell one model from another.

    Args:
      names: path name to position.
      leaves: the leaves.

    Returns:
      Path name to a sum of the leaf's bits, which depends on their places.
    """
    return {name: _looked_at(leaves.all[i])[1] for name, i in names.items()}


def _looked_at(leaf: Any) -> tuple[bool, int]:
    """Whether a leaf is finite, and its fingerprint; read for it where it is stored."""
    finite, mark = meshes.automatic(_looked, array(leaf))
    return bool(finite), int(mark)


@jax.jit
def _looked(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jnp.asarray(leaf, np.float32) if leaf.dtype != np.float32 else leaf
    words = jax.lax.bitcast_convert_type(bits, np.uint32)
    place = jnp.zeros_like(words)
    for axis, size in enumerate(words.shape):
        own = jax.lax.broadcasted_iota(np.uint32, words.shape, axis)
        place = place * np.uint32(size) + own
    mark = jnp.sum(words * (2 * place + 1), dtype=np.uint32)
    return jnp.all(jnp.isfinite(leaf)), mark
