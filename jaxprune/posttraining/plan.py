"""The weights of a job as matrices: how much of each goes, and how one is solved.

All that can be refused is refused before the walk begins, for all weights at once.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.arrays.axes import Axes
from jaxprune.arrays.lazy import Leaves, array
from jaxprune.graph.linear_ops import Product
from jaxprune.masking import allocation, patterns
from jaxprune.masking.allocation import Allocation, Rule, Weight
from jaxprune.masking.patterns import PerOutput, Unstructured
from jaxprune.posttraining import fingerprint
from jaxprune.posttraining.calibration import Moments
from jaxprune.posttraining.methods import Matrix, Method
from jaxprune.typing import Params, Pattern


class Plan(NamedTuple):
    """What is done to which weight.

    Attributes:
      method: how a matrix is solved.
      pattern: which weights live and die together.
      sparsity: what was asked for.
      rule: how it was shared out.
      removed: name of the weight to the units that go from each of its matrices.
    """

    method: Method
    pattern: Pattern
    sparsity: float | Mapping[str, float] | None
    rule: Rule
    removed: dict[str, list[int]]

    def facts(self) -> dict[str, Any]:
        """What decides the result, JSON-able."""
        return {
            "method": repr(self.method),
            "pattern": repr(self.pattern),
            "sparsity": self.sparsity,
            "allocation": repr(self.rule),
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
    seen = {name: fingerprint.looked_at(leaves[i]) for name, i in names.items()}
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
    pattern: Pattern | str | None,
    shared: Allocation,
    moments: Callable[[], Mapping[str, Moments]],
) -> Plan:
    """Decides how much of each weight goes.

    Args:
      products: of the weights to prune.
      leaves: all of the parameters' leaves.
      method: how a matrix is solved.
      sparsity: the share to remove, or {glob: share}, or None.
      pattern: which weights live and die together, or None for the method's own.
      shared: how the sparsity is shared out.
      moments: gives the dense model's, called where the rule needs them.

    Returns:
      The plan.

    Raises:
      ValueError: something does not fit; the sentence names the weights.
    """
    weights = {p.name: p for p in products if p.use == 0}
    pattern = patterns.named(method.pattern if pattern is None else pattern)
    agreed, rule = allocation.agreed(sparsity, pattern, shared)
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
    seen = moments() if rule.needs_inputs else {}
    known = [_known(p, leaves, seen.get(name)) for name, p in weights.items()]
    counts = allocation.counts(agreed, rule, known, list(units.values()))
    removed = {
        name: _spread(count, weights[name].shape[0])
        for name, count in zip(weights, counts, strict=True)
    }
    return Plan(method, pattern, sparsity, rule, removed)


def _try(method: Method, pattern: Pattern, inputs: int, outputs: int) -> None:
    """Lets a method refuse a pattern, by a call that computes nothing."""
    shapes = [(inputs, outputs), (inputs,), (inputs, inputs), ()]
    kinds = (np.float32, np.float32, np.float32, np.uint32)
    arrays = map(jax.ShapeDtypeStruct, shapes, kinds)
    jax.eval_shape(
        lambda w, m, h, r: method.prune(Matrix(w, m, h, r, pattern)), *arrays
    )


def _known(product: Product, leaves: Leaves, moments: Moments | None) -> Weight:
    """What a rule may know of a weight."""
    return Weight(
        name=product.name,
        leaf=product.leaf,
        index=product.index,
        shape=product.shape,
        view=product.view.read,
        read=functools.partial(_matrix, product, leaves),
        mean_square=None if moments is None else moments.mean_square,
    )


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
