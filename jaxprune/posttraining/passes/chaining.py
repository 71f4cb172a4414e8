"""Passes in a row, and the one place that says which of them go together.

A chain has one pass that chooses which weights are kept, and at most one of each other
kind. `RULES` is all that does not compose; whoever runs a chain asks for nothing else.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxprune.masking.counts import Sparsity
from jaxprune.posttraining.passes.base import Matrix, Observation, Pass
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.passes.pruning import METHODS, Magnitude, Prune
from jaxprune.posttraining.passes.quantization import Quantize
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.posttraining.solvers.quantization import Quantization


@dataclasses.dataclass(frozen=True)
class Chain(Pass):
    """Passes that `jp.prune_trained` makes together, segment by segment.

    Attributes:
      passes: the passes, in order; a chain among them stands for its passes.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        """Refuses what does not compose."""
        kinds = [_kind(step) for step in self.passes]
        order = [_ORDER.index(pass_kind) for pass_kind in kinds if pass_kind in _ORDER]
        pruning = [step for step in self.passes if isinstance(step, Prune)]
        names = ", ".join(type(step).__name__ for step in self.passes) or "none"
        if len(pruning) != 1:
            raise ValueError(
                "a chain needs one pass that chooses which weights are kept, got "
                f"{names}; begin with jp.passes.sparsegpt(0.5), or leave the others out"
            )
        if len({*kinds}) < len(kinds):
            repeated = max(kinds, key=kinds.count).__name__
            raise ValueError(
                f"a chain takes each kind of pass once, got {names}; leave one "
                f"{repeated} out"
            )
        if order != sorted(order):
            raise ValueError(
                f"a chain prunes, then quantizes, got {names}; put quantize last"
            )
        if Correct in kinds and self.correction > 0 and pruning[0].inputs == "dense":
            raise ValueError(
                "correct goes by the inputs that earlier layers leave, but "
                'inputs="dense" was given; leave one of the two out'
            )

    @property
    def observes(self) -> frozenset[Observation]:
        """What its passes observe."""
        return frozenset().union(*(step.observes for step in self.passes))

    @property
    def pruning(self) -> Prune:
        """The pass that chooses which weights are kept."""
        return next(step for step in self.passes if isinstance(step, Prune))

    @property
    def correction(self) -> float:
        """Share of earlier errors that is made up for; 0 without a correction."""
        shares = (step.share for step in self.passes if isinstance(step, Correct))
        return next(shares, 0.0)

    @property
    def quantizing(self) -> Pass | None:
        """The pass that puts kept weights on levels, or None."""
        return next((step for step in self.passes if step.quantization), None)

    @property
    def quantization(self) -> Quantization | None:
        """The levels that kept weights lie on in the end, or None."""
        return None if self.quantizing is None else self.quantizing.quantization

    @property
    def others(self) -> list[Pass]:
        """The passes of no kind of ours: a caller's own."""
        return [step for step in self.passes if not isinstance(step, _KINDS)]

    @property
    def reads_inputs(self) -> bool:
        """Whether what it does to a matrix depends on the matrix' input."""
        return not self.observes.isdisjoint({"squares", "hessian"})

    @property
    def solver(self) -> "Chain":
        """The chain without sparsities, as programs are compiled for it."""
        steps = self.passes
        return Chain(
            tuple(step.bare if isinstance(step, Prune) else step for step in steps)
        )

    @property
    def by_magnitude(self) -> "Chain":
        """The chain for a matrix whose input says too little: by the weights alone."""
        levels = [step for step in self.passes if step.quantization is not None]
        return Chain((Magnitude(), *levels))

    def target(
        self,
        weight: Float[Array, "in out"],
        hessian: Float[Array, "in in"],
        drift: Float[Array, "in in"],
        damping: float,
    ) -> jax.Array:
        """The matrix that the solver is to come near, by all passes."""
        for step in self.passes:
            if "drift" in step.observes:
                weight = step.target(weight, hessian, drift, damping)
        return weight

    def solve(self, matrix: Matrix) -> Solution:
        """The matrix, pruned, and settled by the other passes.

        Args:
          matrix: what to prune; its `quantization` is this chain's.

        Returns:
          The solution.
        """
        pruning = self.pruning
        solution = pruning.solve(matrix)
        for step in self.passes:
            if step.quantization is None or not pruning.quantizes:
                solution = step.settle(matrix, solution, pruning.damping)
        return solution

    def with_settings(self, **settings: Any) -> "Chain":
        """The chain with some settings of its pruning pass replaced."""
        pruning = self.pruning
        changed = dataclasses.replace(pruning, **settings)
        return Chain(
            tuple(changed if step is pruning else step for step in self.passes)
        )


def chain(*passes: Pass) -> Chain:
    """Passes that are made together, segment by segment, for `jp.prune_trained`.

    Args:
      *passes: one that chooses which weights are kept, such as `sparsegpt`, then any of
        `correct` and `quantize`; or chains of them.

    Returns:
      The chain, itself a pass.

    Raises:
      ValueError: the passes do not go together.
      TypeError: one is no pass.

    Example:
      >>> import jaxprune as jp
      >>> passes = jp.passes.chain(jp.passes.alps(0.5), jp.passes.quantize("int4"))
      >>> [type(step).__name__ for step in passes.passes]
      ['ALPS', 'Quantize']
    """
    wrong = [p for p in passes if not isinstance(p, Pass)]
    if wrong:
        raise TypeError(
            f'a chain takes passes, got {wrong}; write jp.passes.quantize("int4"), and '
            "the like"
        )
    flat: list[Pass] = []
    for step in passes:
        flat += step.passes if isinstance(step, Chain) else [step]
    return Chain(tuple(flat))


def as_chain(method: Pass | str, sparsity: Sparsity = None) -> Chain:
    """A method of `jp.prune_trained` as a chain.

    Args:
      method: a name of `METHODS`, a pass, or a chain.
      sparsity: share that replaces the one of the pruning pass, or None.

    Returns:
      The chain.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is neither a name nor a pass.

    Example:
      >>> from jaxprune.posttraining.passes.chaining import as_chain
      >>> as_chain("wanda", 0.5).pruning.sparsity
      0.5
    """
    choices = (
        f"method must be one of {', '.join(METHODS)}, or a value such as "
        f"jp.passes.sparsegpt(), got {method!r}"
    )
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(choices)
        method = METHODS[method]()
    if not isinstance(method, Pass):
        raise TypeError(choices)
    passes = chain(method)
    return passes if sparsity is None else passes.with_settings(sparsity=sparsity)


# A correction may stand on either side of the pass whose target it changes.
_ORDER = (Prune, Quantize)
_KINDS = (Prune, Correct, Quantize)


def _kind(step: Pass) -> type[Pass]:
    """The kind of pass of which a chain has one at most."""
    return next(
        (pass_kind for pass_kind in _KINDS if isinstance(step, pass_kind)), type(step)
    )
