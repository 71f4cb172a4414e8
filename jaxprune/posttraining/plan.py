"""What a job does to which weight: how many units of each matrix are kept.

All that can be refused is refused before the first segment runs, for all weights at
once.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.arrays.axes import Axes
from jaxprune.arrays.lazy import Leaves, array
from jaxprune.arrays.messages import listed
from jaxprune.arrays.per_device import PerDevice
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.masking import counts, patterns
from jaxprune.masking.allocation import Rule, Weight
from jaxprune.masking.counts import Allocation
from jaxprune.masking.patterns import PerOutput, Unstructured
from jaxprune.posttraining.fingerprint import Fingerprint
from jaxprune.posttraining.input_statistics import InputStatistics
from jaxprune.posttraining.methods import Matrix, Method, pruned
from jaxprune.posttraining.solvers.rounding import Rounding
from jaxprune.typing import Pattern


class Plan(NamedTuple):
    """What is done to which weight.

    Attributes:
      method: how a matrix is pruned.
      pattern: which weights are pruned as a unit.
      sparsity: what was asked for.
      rule: how it was shared out.
      units: name of the weight to the number of its units.
      kept: name of the weight to the units that each of its matrices keeps.
      rounding: the levels that kept weights shall lie on, or None.
    """

    method: Method
    pattern: Pattern
    sparsity: float | Mapping[str, float] | None
    rule: Rule
    units: dict[str, int]
    kept: dict[str, list[int]]
    rounding: Rounding | None = None

    @property
    def removed(self) -> dict[str, int]:
        """Name of the weight to the number of units that it loses."""
        return {name: self.units[name] - sum(own) for name, own in self.kept.items()}

    def facts(self) -> dict[str, Any]:
        """What decides the result, JSON-able."""
        return {
            "method": repr(self.method),
            "pattern": repr(self.pattern),
            "sparsity": _plain(self.sparsity),
            "allocation": repr(self.rule),
            "removed": self.removed,
            "rounding": self.rounding and repr(self.rounding),
        }


def _plain(sparsity: Any) -> Any:
    """A sparsity as JSON has it; it may be NumPy's, or a fraction."""
    if isinstance(sparsity, Mapping):
        return {name: float(share) for name, share in sparsity.items()}
    return None if sparsity is None else float(sparsity)


def check_leaves(leaves: Leaves, ops: Sequence[LinearOp], *, donate: bool) -> None:
    """Refuses leaves that cannot be pruned; no value is read.

    Args:
      leaves: the parameters' leaves, in flattening order.
      ops: of the weights to prune.
      donate: whether the old weights are given up; then no two leaves may be one.

    Raises:
      ValueError: a leaf to prune is abstract or traced, two weights overlap in their
        leaf, or a leaf to give up is used twice.
    """
    names = {op.leaf: op.view.leaf for op in ops}
    traced = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if wrong := [k for k, i in names.items() if isinstance(leaves.all[i], traced)]:
        raise ValueError(
            f"the parameters must be arrays with values, but {listed(wrong)} are not; "
            "call prune_trained outside of jit"
        )
    # With `donate` the old weights are given up, so no two leaves may be one array.
    uses = collections.Counter(map(id, leaves.all))
    if donate and (
        shared := [k for k, i in names.items() if uses[id(leaves.all[i])] > 1]
    ):
        raise ValueError(
            f"donate=True needs arrays that nothing else uses, but {listed(shared)} "
            "are other leaves as well; copy those with jnp.copy, or leave donate out"
        )
    _check_apart(ops)


def check_finite(fingerprints: Mapping[str, Fingerprint]) -> None:
    """Refuses leaves to prune that hold NaN or infinity, all by name."""
    if wrong := [name for name, own in fingerprints.items() if not own.finite]:
        raise ValueError(
            f"the weights to prune must be finite, but {listed(wrong)} hold NaN or "
            "infinity; look for a damaged checkpoint"
        )


def _check_apart(ops: Sequence[LinearOp]) -> None:
    """Refuses weights that are parts of one another."""
    by_leaf: dict[str, dict[str, LinearOp]] = {}
    for op in ops:
        by_leaf.setdefault(op.leaf, {})[op.name] = op
    for leaf, own in by_leaf.items():
        for one, other in itertools.combinations(own.values(), 2):
            if not one.view.is_apart(other.view):
                raise ValueError(
                    f"each weight must be used as one part of its leaf, but "
                    f"'{other.name}' and '{one.name}' overlap; leave the leaf out with "
                    f"prunable=jp.tree.excluding('{leaf}')"
                )


def planned(
    ops: Sequence[LinearOp],
    leaves: Leaves,
    method: Method,
    sparsity: float | Mapping[str, float] | None,
    pattern: Pattern | str | None,
    shared: Allocation,
    statistics: Callable[[], Mapping[str, InputStatistics]],
    devices: PerDevice | None = None,
    rounding: Rounding | None = None,
) -> Plan:
    """Decides how many units each weight keeps.

    Args:
      ops: of the weights to prune.
      leaves: all of the parameters' leaves.
      method: how a matrix is pruned.
      sparsity: the share to remove, or {glob: share}, or None.
      pattern: which weights are pruned as a unit, or None for the method's own.
      shared: how the sparsity is shared out.
      statistics: gives the dense model's, called where the rule needs them.
      devices: that the statistics lie on, or None.
      rounding: the levels that kept weights shall lie on, or None.

    Returns:
      The plan.

    Raises:
      ValueError: something does not fit; the sentence names the weights.
    """
    weights = {op.name: op for op in ops if op.use == 0}
    pattern = patterns.parse(method.pattern if pattern is None else pattern)
    agreed, rule = counts.agreed(sparsity, pattern, shared)
    problems = [
        f"{why} at '{name}'"
        for name, op in weights.items()
        if (why := pattern.problem(op.shape[1:], Axes()))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; leave such weights out with "
            "prunable=jp.tree.excluding('...')"
        )
    # Once for each shape, before anything is computed.
    for inputs, outputs in {op.shape[1:] for op in weights.values()}:
        _try(method, pattern, rounding, inputs, outputs)
    units = {name: _units(pattern, op) for name, op in weights.items()}
    seen = statistics() if rule.needs_inputs else {}
    known = [
        _known(op, leaves, seen.get(name), devices) for name, op in weights.items()
    ]
    lost = counts.by_rule(agreed, rule, known, list(units.values()))
    kept = {
        name: _kept(units[name], count, weights[name].shape[0])
        for name, count in zip(weights, lost, strict=True)
    }
    return Plan(method, pattern, sparsity, rule, units, kept, rounding)


def _try(
    method: Method,
    pattern: Pattern,
    rounding: Rounding | None,
    inputs: int,
    outputs: int,
) -> None:
    """Lets a method refuse a pattern, by a call that computes nothing."""
    shapes = [(inputs, outputs), (inputs,), (inputs, inputs), ()]
    kinds = (np.float32, np.float32, np.float32, np.uint32)
    arrays = map(jax.ShapeDtypeStruct, shapes, kinds)
    jax.eval_shape(
        lambda w, m, h, k: pruned(method, Matrix(w, m, h, k, pattern, rounding)),
        *arrays,
    )


def _known(
    op: LinearOp,
    leaves: Leaves,
    statistics: InputStatistics | None,
    devices: PerDevice | None,
) -> Weight:
    """What a rule may know of a weight."""

    def read() -> jax.Array:
        weight = op.view.read(array(leaves.all[op.view.leaf]))
        # Whole beside its statistics: sums of parts would differ in their last bits.
        whole = devices is not None and statistics is not None
        return devices.everywhere(weight) if devices and whole else weight

    return Weight(
        name=op.name,
        leaf=op.leaf,
        index=op.index,
        shape=op.shape,
        view=op.view.read,
        read=read,
        mean_square=None if statistics is None else statistics.mean_square,
    )


def _units(pattern: Pattern, op: LinearOp) -> int:
    """How many units of the pattern a weight has."""
    batch, *matrix = op.shape
    if isinstance(pattern, Unstructured | PerOutput):
        return op.size
    scores = jax.ShapeDtypeStruct(tuple(matrix), np.float32)
    units = jax.eval_shape(functools.partial(pattern.units, axes=Axes()), scores)
    return batch * int(np.prod(units.shape))


def _kept(units: int, lost: int, parts: int) -> list[int]:
    """What each matrix of a weight keeps; the first ones lose one unit more."""
    share, more = divmod(lost, parts)
    return [units // parts - share - (i < more) for i in range(parts)]
