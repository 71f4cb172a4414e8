"""The linear ops of a traced program: which parameter meets which activation.

Everything is read off the program that a function traces to, so Linen, NNX, Equinox and
plain functions are alike. A linear op is a matmul or a convolution. Its weight is seen
as (batch, in, out) and its input as (batch, samples, in): batch are experts or groups,
samples all positions that meet the same weight. A convolution is the matmul with the
patches of its input.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import lazy, tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import columns, listed
from jaxprune.graph import program as program_
from jaxprune.graph.equation import Equation
from jaxprune.graph.operands import Input, WeightUse, output_parts
from jaxprune.graph.primitives import rules_of
from jaxprune.graph.program import Fixed, Program, Step
from jaxprune.graph.view_rules import Joined, ViewOperand
from jaxprune.graph.weight_parts import index_and_part, inputs_and_outputs
from jaxprune.graph.weight_view import WeightView
from jaxprune.leaves import Explanation, as_rule, explain
from jaxprune.leaves import prunable as is_prunable
from jaxprune.typing import Params, Prunable, PrunableLike


@dataclasses.dataclass(frozen=True)
class LinearOp:
    """One matmul or convolution of a parameter with an activation.

    Attributes:
      name: the weight: the leaf's path name, with the indices of a stacked leaf behind
        it ("blocks/kernel/3") or the part of it that is used ("qkv/kernel[:,0:64]").
      leaf: the leaf's path name.
      index: indices in a stacked leaf, empty for a leaf by itself.
      axes: the leaf's axes that are input and output, the others being batch or index;
        None where an axis of the leaf is in part one and in part the other.
      shape: (batch, in, out).
      operation: "dot" or "convolution".
      input: the number of its input; ops of equal number share it (q, k and v).
      use: 0 for the first use of this weight, 1 and on where the leaf is tied.
      view: the view of the leaf as (batch, in, out).
      source: the way in which the input is read off a value of the program.
      step: the position of the op in the program.
    """

    name: str
    leaf: str
    index: tuple[int, ...]
    axes: Axes | None
    shape: tuple[int, int, int]
    operation: str
    input: int
    use: int
    view: WeightView = dataclasses.field(repr=False)
    source: Input = dataclasses.field(repr=False)
    step: int = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The linear ops of a function, and what could not be seen.

    Attributes:
      linear_ops: the linear ops, in the order of the program.
      unseen: path name to reason, for each leaf of two axes or more that is in no
        linear op.
      leaves: path name to position among the parameters' leaves.
      program: the traced program.
      views: the program's values that are views of a leaf.
    """

    linear_ops: tuple[LinearOp, ...]
    unseen: Mapping[str, str]
    leaves: Mapping[str, int] = dataclasses.field(repr=False)
    program: Program = dataclasses.field(repr=False)
    views: Mapping[int, WeightView] = dataclasses.field(repr=False)

    def axes(self, prunable: PrunableLike = is_prunable) -> dict[str, Axes]:
        """Each leaf's input and output axes, for `axes=` of `masks.make` and `gradual`.

        Args:
          prunable: which leaves may be pruned; see `jp.tree.explain`.

        Returns:
          Path name to axes; without leaves whose uses differ, or that mix them. A
          pattern takes the usual axes of those, so it warns where most are unseen.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> fn = lambda params, x: jnp.einsum("bd,nhd->bnh", x, params["q"])
          >>> params = {"q": jnp.ones((2, 3, 8))}
          >>> jp.trace(fn, params, jnp.ones((4, 8))).axes()
          {'q': Axes(inputs=(2,), outputs=(0, 1))}
        """
        rule = as_rule(prunable)
        self.warn_of_unseen(self.linear_ops, rule)
        axes_of: dict[str, Axes] = {}
        ambiguous = set()  # leaves whose uses differ, as a tied embedding's may
        avals = self._leaf_avals()
        for op in self.linear_ops:
            if not rule(op.leaf, avals[op.leaf]):
                continue
            if op.axes is None or axes_of.setdefault(op.leaf, op.axes) != op.axes:
                ambiguous.add(op.leaf)
        return {leaf: axes for leaf, axes in axes_of.items() if leaf not in ambiguous}

    def explain(self, prunable: PrunableLike = is_prunable) -> Explanation:
        """Which leaves `prune_trained` would prune, and why not the others.

        Beside the rule's reasons, as `jp.tree.explain` has them, those of the program:
        a matrix that no matmul was seen to use, and one whose outputs are the
        function's with no other matrix between, as a head's are. That one is pruned
        unless the rule leaves it alone.

        Args:
          prunable: which leaves may be pruned.

        Returns:
          A row (name, shape, pruned, why) for each leaf; `print` it for a table.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ (p["down"] + p["more"])
          >>> shapes = {"up": (2, 6), "down": (6, 3), "more": (6, 3)}
          >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
          >>> print(jp.trace(fn, params, jnp.ones((5, 2))).explain())
          down  (6, 3)  is an operand of add, dot_general
          more  (6, 3)  is an operand of add, dot_general
          up    (2, 6)  may be pruned
          12 of 48 weights may be pruned
        """
        rows = explain(self._leaf_avals(), prunable=prunable)
        heads = self._leaves_of_result()
        return Explanation(
            row._replace(pruned=False, why=self.unseen[row.name])
            if row.pruned and row.name in self.unseen
            else row._replace(why="pruned, and makes the result" * (row.name in heads))
            if row.pruned
            else row
            for row in rows
        )

    def warn_of_unseen(
        self, ops: Sequence[LinearOp], rule: Prunable, stacklevel: int = 3
    ) -> None:
        """Warns where less than half of the weights that may be pruned are in ops.

        Args:
          ops: linear ops that are used.
          rule: function that says which leaves may be pruned.
          stacklevel: number of calls from here to the user's.
        """
        avals = self._leaf_avals()
        sizes = {n: math.prod(v.shape) for n, v in avals.items() if rule(n, v)}
        total = sum(sizes.values())
        seen = sum(sizes.get(leaf, 0) for leaf in {op.leaf for op in ops})
        if 2 * seen < total:
            unseen = [f"{name} ({why})" for name, why in self.unseen.items()]
            warnings.warn(
                f"only {seen:,} of {total:,} weights that may be pruned were seen in a "
                f"matmul or convolution; not {listed(unseen, 3)}; "
                "print(jp.trace(fn, params, batch).explain()) has all",
                stacklevel=stacklevel,
            )

    def _leaf_avals(self) -> dict[str, Any]:
        """Shape and dtype of each leaf, by its name."""
        leaves = self.program.leaves
        return {n: self.program.avals[leaves[i]] for n, i in self.leaves.items()}

    def _leaves_of_result(self) -> set[str]:
        """The leaves of the last linear ops before the function's results."""
        ops_at: dict[int, list[str]] = {}
        for op in self.linear_ops:
            ops_at.setdefault(op.step, []).append(op.leaf)
        made_by = {n: i for i, s in enumerate(self.program.steps) for n in s.outputs}
        pending, reached = list(self.program.outputs), set[int]()
        leaves: set[str] = set()
        while pending:
            number = pending.pop()
            if isinstance(number, Fixed) or number in reached or number not in made_by:
                continue
            reached.add(number)
            position, step = made_by[number], self.program.steps[made_by[number]]
            leaves.update(ops_at.get(position, ()))
            if rules_of(step.primitive.name).product is None:
                pending += step.inputs
        return leaves

    def __str__(self) -> str:
        """A table: one line a linear op, then what could not be seen."""
        rows = [("weight", "batch x in x out", "input", "use", "kind")]
        rows += [
            (
                op.name,
                " x ".join(map(str, op.shape)),
                str(op.input),
                str(op.use),
                op.operation,
            )
            for op in self.linear_ops
        ]
        unseen = [f"unseen: {name}: {why}" for name, why in self.unseen.items()]
        return "\n".join([columns(rows), *unseen])


def trace(fn: Callable[[Params, Any], Any], params: Params, batch: Any) -> Trace:
    """Lists every matmul and convolution of a parameter with an activation.

    Nothing is computed. Scans are unrolled, so a leaf that is stacked over layers has
    one linear op a layer. On its way to a linear op a leaf may be sliced, reshaped,
    transposed, cast and scaled by a constant. A leaf of two axes or more that reaches
    no linear op in this way is in `unseen`, with the reason.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: a pytree of arrays, or of `jp.LazyArray` or `jax.ShapeDtypeStruct`.
      batch: one batch, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The linear ops, in the order of the program.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 6)), "down": jnp.ones((6, 3))}
      >>> print(jp.trace(fn, params, jnp.ones((5, 2))))
      weight  batch x in x out  input  use  kind
      up      1 x 2 x 6         0      0    dot
      down    1 x 6 x 3         1      0    dot
    """
    params = lazy.abstract(params)
    return of_program(program_.flatten(fn, params, batch), params)


def of_program(flat: Program, params: Params) -> Trace:
    """`trace` of a program that was traced before."""
    leaves = tree.named_leaves(params).items()
    shapes = {name: np.shape(x) for name, x in leaves if not tree.is_excluded(x)}
    finder = _Finder(flat, list(shapes))
    for position, step in enumerate(flat.steps):
        finder.look(position, step)
    return Trace(
        tuple(finder.ops),
        finder.unseen(shapes),
        {name: i for i, name in enumerate(shapes)},
        flat,
        finder.views,
    )


class _Finder:
    """Follows each leaf through the steps to its linear ops."""

    def __init__(self, flat: Program, names: Sequence[str]) -> None:
        self.flat = flat
        self.names = names
        self.ops: list[LinearOp] = []
        self.views: dict[int, WeightView] = {
            number: WeightView.whole(i, flat.avals[number].shape)
            for i, number in enumerate(flat.leaves)
        }
        # Value to the leaves that it was made of, views and others.
        self._origins: dict[int, frozenset[int]] = {
            number: frozenset([i]) for i, number in enumerate(flat.leaves)
        }
        # Leaf to the primitives that hide it, in order of appearance.
        self._hidden: dict[int, dict[str, None]] = {}
        self._joined: dict[int, Joined] = {}
        # Input to its number; `Input` leaves the values out when it is compared.
        self._inputs: dict[tuple[tuple[int, ...], Input], int] = {}
        self._uses: dict[str, int] = {}

    def look(self, position: int, step: Step) -> None:
        """Takes one more step into account."""
        numbers = [x for x in step.inputs if not isinstance(x, Fixed)]
        if not self._moves_leaves(step) and not self._is_linear_op(position, step):
            for number in numbers:
                for leaf in self._origins.get(number, ()):
                    self._hidden.setdefault(leaf, {})[step.primitive.name] = None
        origins = frozenset().union(*(self._origins.get(x, ()) for x in numbers))
        varying = not self.flat.varying.isdisjoint(step.outputs)
        # What depends on the batch is an activation, however many leaves are in it.
        if origins and not varying:
            self._origins.update(dict.fromkeys(step.outputs, origins))

    def _moves_leaves(self, step: Step) -> bool:
        """Whether a step's results are views of leaves, which are noted then."""
        views = rules_of(step.primitive.name).view(self._equation(step))
        if views is None:
            return False
        for number, view in zip(step.outputs, views, strict=True):
            if isinstance(view, Joined):
                self._joined[number] = view
            else:
                self.views[number] = view
        # What is joined may be cut apart again; until then its leaves are not seen.
        return all(isinstance(view, WeightView) for view in views)

    def _equation(self, step: Step) -> Equation[ViewOperand]:
        flat, operands = self.flat, []
        for x in step.inputs:
            # Computed only where a rule asks for it.
            value = functools.partial(program_.constant_value, flat, x)
            if isinstance(x, Fixed):
                operands.append(ViewOperand(np.shape(x.value), None, value))
            else:
                view = self.views.get(x) or self._joined.get(x)
                operands.append(ViewOperand(flat.avals[x].shape, view, value))
        shapes = [tuple(flat.avals[number].shape) for number in step.outputs]
        return Equation(step.primitive.name, step.params, operands, shapes)

    def unseen(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Why leaves that could be matrices are in no linear op."""
        used = {op.leaf for op in self.ops}
        reasons = {}
        for i, (name, shape) in enumerate(shapes.items()):
            if name in used or len(shape) < 2:
                continue
            steps = ", ".join(self._hidden.get(i, ()))
            reasons[name] = f"is an operand of {steps}" if steps else "is not used"
        return reasons

    def _is_linear_op(self, position: int, step: Step) -> bool:
        """Whether a step is one of a leaf and an activation, which is noted then."""
        product = rules_of(step.primitive.name).product
        if product is None:
            return False
        leaves = self.views.keys() | self._joined.keys()
        sides = [i for i, x in enumerate(step.inputs) if x in leaves]
        # Two leaves multiplied with each other, as in an adapter, are no linear op.
        if len(sides) != 1 or sides[0] > 1:
            return False
        weight, value = step.inputs[sides[0]], step.inputs[1 - sides[0]]
        if isinstance(weight, Fixed) or isinstance(value, Fixed):
            return False
        if value not in self.flat.varying:
            return False
        if jnp.issubdtype(self.flat.avals[value].dtype, jnp.complexfloating):
            return False  # statistics are of real inputs
        # Kernels that are joined along their outputs, as a fused qkv, share an input.
        parts = (
            (self.views[weight],)
            if weight in self.views
            else output_parts(step, sides[0], self._joined[weight])
        )
        operands = [
            product.operands(WeightUse(step, sides[0], part, value, self.flat.avals))
            for part in parts
        ]
        if not operands or None in operands:
            return False
        for pair in operands:
            self._note(position, step, *pair)  # type: ignore[misc]
        return True

    def _note(self, position: int, step: Step, view: WeightView, source: Input) -> None:
        leaf = self.names[view.leaf]
        index, part = index_and_part(
            view, self.flat.avals[self.flat.leaves[view.leaf]].shape
        )
        name = "/".join([leaf, *map(str, index)]) + part
        # The same weight once more, as the head of a model with tied embeddings has it.
        use = self._uses.get(name, 0)
        self._uses[name] = use + 1
        self.ops.append(
            LinearOp(
                name=name,
                leaf=leaf,
                index=index,
                axes=inputs_and_outputs(view),
                shape=view.shape,  # type: ignore[arg-type]
                operation="dot" if "dot" in step.primitive.name else "convolution",
                input=self._inputs.setdefault(
                    (source.values, source), len(self._inputs)
                ),
                use=use,
                view=view,
                source=source,
                step=position,
            )
        )
