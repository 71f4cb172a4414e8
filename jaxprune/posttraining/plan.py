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
from jaxprune.masking import counts, patterns, quotas
from jaxprune.masking.allocation import Rule as AllocationRule
from jaxprune.masking.allocation import Weight
from jaxprune.masking.patterns import PerOutput, Unstructured
from jaxprune.posttraining.fingerprint import Fingerprint
from jaxprune.posttraining.passes.base import Matrix
from jaxprune.posttraining.passes.chaining import Chain
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.typing import Pattern


class Plan(NamedTuple):
    """What is done to which weight.

    Attributes:
      chain: the passes.
      pattern: which weights are pruned as a unit.
      rule: how the sparsity was shared out.
      units: name of the weight to the number of its units.
      kept: name of the weight to the units that each of its matrices keeps.
    """

    chain: Chain
    pattern: Pattern
    rule: AllocationRule
    units: dict[str, int]
    kept: dict[str, list[int]]

    @property
    def removed(self) -> dict[str, int]:
        """Name of the weight to the number of units that it loses."""
        return {name: self.units[name] - sum(kept) for name, kept in self.kept.items()}

    def facts(self) -> dict[str, Any]:
        """What decides the result, JSON-able."""
        pruning, levels = self.chain.pruning, self.chain.quantization
        settings = ", ".join(f"{k}={v!r}" for k, v in pruning.settings.items())
        return {
            "method": f"{type(pruning).__name__}({settings})",
            "pattern": repr(self.pattern),
            "sparsity": _plain(pruning.sparsity),
            "allocation": repr(self.rule),
            "removed": self.removed,
            "correction": self.chain.correction,
            "quantization": levels and repr(levels),
            "other_passes": [repr(step) for step in self.chain.others],
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
      ops: linear ops of the weights to prune.
      donate: whether the old weights are given up; then no two leaves may be one.

    Raises:
      ValueError: a leaf to prune is abstract or traced, two weights overlap in their
        leaf, or a leaf to give up is used twice.
    """
    names = {op.leaf: op.view.leaf for op in ops}
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    uses = collections.Counter(map(id, leaves.all))
    # With `donate` the old weights are given up, so no two leaves may be one array.
    shared = [k for k, i in names.items() if donate and uses[id(leaves.all[i])] > 1]
    if lazy := [k for k, i in names.items() if isinstance(leaves.all[i], abstract)]:
        raise ValueError(
            f"the parameters must be arrays with values, but {listed(lazy)} are not; "
            "call prune_trained outside of jit"
        )
    if shared:
        raise ValueError(
            f"donate=True needs arrays that nothing else uses, but {listed(shared)} "
            "are other leaves as well; copy those with jnp.copy, or leave donate out"
        )
    by_leaf: dict[str, dict[str, LinearOp]] = {}
    for op in ops:
        by_leaf.setdefault(op.leaf, {})[op.name] = op
    for leaf, uses_of_leaf in by_leaf.items():
        for first, second in itertools.combinations(uses_of_leaf.values(), 2):
            if not first.view.is_apart(second.view):
                raise ValueError(
                    "each weight must be used as one part of its leaf, but "
                    f"'{second.name}' and '{first.name}' overlap; leave the leaf out "
                    f"with prunable=jp.tree.excluding('{leaf}')"
                )


def check_finite(fingerprints: Mapping[str, Fingerprint]) -> None:
    """Refuses leaves to prune that hold NaN or infinity, all by name."""
    broken = listed((name for name, mark in fingerprints.items() if not mark.finite))
    if broken:
        raise ValueError(
            f"the weights to prune must be finite, but {broken} hold NaN or infinity; "
            "look for a damaged checkpoint"
        )


def make_plan(
    program: SegmentedProgram,
    chain: Chain,
    statistics: Callable[[], Mapping[str, InputStatistics]],
) -> Plan:
    """Decides how many units each weight keeps.

    Args:
      program: the program, cut at the weights to prune, with all leaves.
      chain: the passes.
      statistics: function that gives the dense model's statistics, called where the
        allocation needs them; with a mesh they lie on its devices.

    Returns:
      The plan.

    Raises:
      ValueError: something does not fit; the sentence names the weights.
    """
    pruning, leaves = chain.pruning, program.leaves
    weights = {op.name: op for op in program.ops if op.use == 0}
    usual = pruning.usual_pattern
    pattern = patterns.parse(usual if pruning.pattern is None else pruning.pattern)
    sparsity, rule = counts.agreed(pruning.sparsity, pattern, pruning.allocation)
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
        _try(chain, pattern, inputs, outputs)
    units = {name: _units(pattern, op) for name, op in weights.items()}
    moments = statistics() if rule.needs_inputs else {}
    facts = [
        _weight_facts(op, leaves, moments.get(name), program.devices)
        for name, op in weights.items()
    ]
    # A count for each weight; its matrices share it as evenly as they can.
    lost = counts.by_rule(sparsity, rule, facts, list(units.values()))
    kept = {
        name: _kept(units[name], count, weights[name].shape[0])
        for name, count in zip(weights, lost, strict=True)
    }
    left = list(map(sum, kept.values()))
    quotas.warn_of_empty(list(units), list(units.values()), left, stacklevel=4)
    return Plan(chain, pattern, rule, units, kept)


def _try(chain: Chain, pattern: Pattern, inputs: int, outputs: int) -> None:
    """Lets passes refuse a pattern, by a call that computes nothing."""
    solver = chain.solver

    def solve(weight: Any, square: Any, hessian: Any, kept: Any) -> Any:
        read = hessian if "hessian" in solver.observes else None
        return solver.solve(
            Matrix(weight, square, read, kept, pattern, solver.quantization)
        )

    shapes = [(inputs, outputs), (inputs,), (inputs, inputs), ()]
    dtypes = (np.float32, np.float32, np.float32, np.uint32)
    jax.eval_shape(solve, *map(jax.ShapeDtypeStruct, shapes, dtypes))


def _weight_facts(
    op: LinearOp,
    leaves: Leaves,
    statistics: InputStatistics | None,
    devices: PerDevice | None,
) -> Weight:
    """What an allocation may know of a weight."""

    def read() -> jax.Array:
        weight = op.view.read(array(leaves.all[op.view.leaf]))
        # Whole beside its statistics: sums of parts would differ in their last bits.
        beside = devices is not None and statistics is not None
        return devices.everywhere(weight) if devices and beside else weight

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
