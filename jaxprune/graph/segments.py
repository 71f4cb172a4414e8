"""A traced program cut into stages: up to an input, what shares it, on to the next.

A stage computes one input from the activations at hand. All products that share the
input belong to it; once they are dealt with, the next stage uses the weights as they
are by then. What depends on the parameters alone is made again where it is needed, so
that nothing but live activations is held. Slices of stacked leaves are handed in, and
so are tables that depend on nothing, so that equal layers are equal programs.
"""

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.arrays.lazy import Leaves
from jaxprune.graph import program as program_
from jaxprune.graph.linear_ops import Input, Product, Trace
from jaxprune.graph.program import Piece, Program

_TABLE = 2**24  # bytes: larger tables are made again for each batch


@dataclasses.dataclass(frozen=True)
class Stage:
    """The way to one input.

    Attributes:
      source: the input.
      products: those whose input it is, in the order of the program.
      piece: from the activations at hand to the input and what later stages need.
      later: the activations that later stages need.
    """

    source: Input
    products: tuple[Product, ...]
    piece: Piece
    later: frozenset[int]


class Stages:
    """The stages of a program, and the parameters they run with.

    Attributes:
      trace: what was traced.
      leaves: the parameters' leaves, in flattening order; replaced as weights change.
      stages: in order.
      last: name of a weight to the position of its last product.
    """

    def __init__(self, trace: Trace, leaves: Leaves, chosen: Sequence[Product]) -> None:
        """Cuts the program.

        Args:
          trace: of the function.
          leaves: the parameters' leaves, in flattening order.
          chosen: the products that matter; the program ends at the last of them.
        """
        self.trace = trace
        self.leaves = leaves
        self.stages = _cut(trace, chosen)
        uses = collections.Counter(product.name for product in chosen)
        self.last = {product.name: product.step for product in chosen}
        self._tied = {name for name, number in uses.items() if number > 1}
        self._leaf_of = {n: i for i, n in enumerate(trace.program.leaves)}
        self._idle: dict[int, jax.Array] = {}  # computed once
        self._compiled: dict[Any, Callable[..., list[jax.Array]]] = {}
        self._until = {
            i: k for k, own in enumerate(self.stages) for i in self.uses(own)
        }

    def uses(self, stage: Stage) -> set[int]:
        """The positions of the leaves that a stage reads or prunes."""
        pruned = {product.view.leaf for product in stage.products}
        read = map(self._leaf, stage.piece.inputs)
        return pruned | {i for i in read if i is not None}

    @property
    def used(self) -> dict[str, int]:
        """The leaves that any stage reads or prunes: name to position."""
        return {n: i for n, i in self.trace.leaves.items() if i in self._until}

    def done(self, number: int) -> list[int]:
        """The positions of the leaves whose last use is in the stage of this number."""
        return [i for i, last in self._until.items() if last == number]

    def _leaf(self, number: int) -> int | None:
        """The position of the leaf that a value is, or is a part of."""
        if number in self._leaf_of:
            return self._leaf_of[number]
        view = self.trace.views.get(number)
        return view.leaf if view else None

    def start(self, batch: Any) -> dict[int, jax.Array]:
        """The activations before the first stage: the batch itself.

        Where the parameters are on one device it is put there for good, or the programs
        of the first stages would be compiled again for those that follow.
        """
        where = self.leaves.device
        if where is not None:
            batch = jax.device_put(batch, where)
        return dict(zip(self.trace.program.batch, jax.tree.leaves(batch), strict=True))

    def fixed(self, stage: Stage) -> dict[int, Any]:
        """What a stage needs besides activations: leaves, slices of them, constants.

        Args:
          stage: the stage.

        Returns:
          Arrays by the number of the value; the same for every batch.
        """
        flat = self.trace.program
        given: dict[int, Any] = {}
        for number in stage.piece.inputs:
            if number in self._leaf_of:
                given[number] = self.leaves[self._leaf_of[number]]
            elif number in flat.constants:
                given[number] = flat.constants[number]
            elif number in self.trace.views:
                view = self.trace.views[number]
                given[number] = view.read(self.leaves[view.leaf])
            elif number not in flat.varying:
                given[number] = self._fixed(number)
        return given

    def _fixed(self, number: int) -> jax.Array:
        """A value that depends on neither parameters nor batch."""
        if number not in self._idle:
            self._idle[number] = program_.constant(self.trace.program, number)
        return self._idle[number]

    def sharing(self, stage: Stage) -> list[list[str]]:
        """The names of a stage's weights, by whose statistics are the same.

        Those of a tied weight are its own, since it has other inputs besides.
        """
        alone = [[p.name] for p in stage.products if p.name in self._tied]
        rest = [p.name for p in stage.products if p.name not in self._tied]
        return ([rest] if rest else []) + alone

    def run(
        self,
        stage: Stage,
        live: Mapping[int, jax.Array],
        fixed: Mapping[int, Any],
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Takes one batch through a stage.

        Args:
          stage: the stage.
          live: the batch's activations so far.
          fixed: what `fixed` gave.

        Returns:
          The input's value, and the activations that later stages need.
        """
        piece = stage.piece
        if piece.key not in self._compiled:
            self._compiled[piece.key] = jax.jit(piece.run)
        at_hand = {**live, **fixed}
        results = self._compiled[piece.key](*(at_hand[n] for n in piece.inputs))
        made = dict(zip(piece.wanted, results, strict=True))
        known = {**live, **made}
        after = {n: x for n, x in known.items() if n in stage.later}
        return known[stage.source.value], after

    def form(self) -> str:
        """A digest of what the stages compute, the same in every process."""
        keys = [repr(stage.piece.key) for stage in self.stages]
        told = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(keys))
        digest = hashlib.sha256(told.encode())
        given = {n for stage in self.stages for n in stage.piece.inputs}
        tables = [self._fixed(n) for n in sorted(given & _tables(self.trace.program))]
        for constant in [*self.trace.program.constants.values(), *tables]:
            digest.update(np.ascontiguousarray(constant).tobytes())
        return digest.hexdigest()

    @property
    def programs(self) -> int:
        """How many different programs the stages have been compiled to."""
        return len(self._compiled)


def layers(stages: Sequence[Stage]) -> list[range]:
    """The stages of each layer, where equal layers follow each other.

    A layer's first stage begins in what comes before it, and may be another program in
    the first layer; all its other stages have the steps of the next layer's. What is
    handed on may differ: nothing after the last layer needs its residual.

    Args:
      stages: of a program, in order.

    Returns:
      Positions, in order; a stage that repeats nothing, or only itself, is alone.
    """
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(s.piece.form, len(numbers)) for s in stages]
    found: list[range] = []
    start, period = 0, 1
    while start < len(kinds):
        inner = kinds[start + 1 : start + period]
        before = kinds[start - period + 1 : start]
        if period == 1 or inner != before:
            period = _period(kinds, start)
        found.append(range(start, start + period))
        start += period
    return found


def _period(kinds: Sequence[int], start: int) -> int:
    """After how many stages those that follow the first come again; 1 where never."""
    rest = kinds[start + 1 :]
    if rest[:1] == rest[1:2]:
        return 1
    for period in range(2, len(rest) // 2 + 2):
        inner, after = rest[: period - 1], rest[period : 2 * period - 1]
        if inner == after:
            return period
    return 1


def _cut(trace: Trace, chosen: Sequence[Product]) -> list[Stage]:
    flat = trace.program
    groups: dict[int, list[Product]] = {}
    for product in chosen:
        groups.setdefault(product.input, []).append(product)
    ordered = sorted(groups.values(), key=lambda own: own[0].step)

    given = {*flat.leaves, *flat.batch, *flat.constants, *_tables(flat)}
    parts = {n for n, view in trace.views.items() if view.sliced and not view.cast}
    made: set[int] = set()
    positions, uses = [], []
    for own in ordered:
        at_hand = made | given | parts
        wanted = [own[0].source.value]
        steps = program_.needed(flat, wanted, at_hand.__contains__)
        positions.append(steps)
        inputs = program_.piece(flat, steps, wanted).inputs
        uses.append({n for n in inputs if n in flat.varying})
        made |= {n for i in steps for n in flat.steps[i].outputs if n in flat.varying}
    stages = []
    for k, own in enumerate(ordered):
        later = frozenset().union(*uses[k + 1 :])
        own_made = {n for i in positions[k] for n in flat.steps[i].outputs}
        value = own[0].source.value
        wanted = sorted((own_made & later) | ({value} & own_made))
        piece = program_.piece(flat, positions[k], wanted)
        stages.append(Stage(own[0].source, tuple(own), piece, later))
    return stages


def _tables(flat: Program) -> set[int]:
    """What depends on neither parameters nor batch and is worth computing once.

    Not what is only made larger, which costs less to make than to read, and nothing
    large.
    """
    cheap = {
        n
        for step in flat.steps
        if step.primitive.name in ("broadcast_in_dim", "iota", "reshape")
        for n in step.outputs
    }
    return {n for n in flat.idle - cheap if _bytes(flat.kinds[n]) <= _TABLE}


def _bytes(kind: Any) -> float:
    plain = isinstance(getattr(kind, "dtype", None), np.dtype)  # no random key
    return int(kind.size) * kind.dtype.itemsize if plain else math.inf
