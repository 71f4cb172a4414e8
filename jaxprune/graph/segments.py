"""A traced program cut into segments: up to an input, what shares it, on to the next.

A segment computes one input from the activations that earlier segments made. All linear
ops that share the input belong to it; once their weights are pruned, the next segment
uses the weights as they are by then. What depends on the parameters alone is computed
again where it is needed, so that only activations are held. Slices of stacked leaves
and tables that depend on nothing are inputs of a segment, so that equal layers are
equal programs.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.graph import program as program_
from jaxprune.graph.linear_ops import Input, LinearOp, Trace
from jaxprune.graph.program import Program, Subgraph

_TABLE = 2**24  # bytes: larger tables are computed again for each batch


@dataclasses.dataclass(frozen=True)
class Segment:
    """The steps to one input.

    Attributes:
      source: the input.
      linear_ops: those whose input it is, in the order of the program.
      subgraph: from earlier activations to the input and what later segments need.
      later: the activations that later segments need.
    """

    source: Input
    linear_ops: tuple[LinearOp, ...]
    subgraph: Subgraph
    later: frozenset[int]


def cut(trace: Trace, chosen: Sequence[LinearOp]) -> list[Segment]:
    """The segments of a program, in order; each computes what none before it has."""
    # The last of the chosen linear ops ends the last segment.
    flat = trace.program
    groups: dict[int, list[LinearOp]] = {}
    for op in chosen:
        groups.setdefault(op.input, []).append(op)
    ordered = sorted(groups.values(), key=lambda own: own[0].step)

    # What every segment is given: whole leaves, the batch, constants, and slices of
    # leaves, but not casts of them, which are cheaper to make again than to hold.
    given = {*flat.leaves, *flat.batch, *flat.closed_over, *_tables(flat)}
    given |= {n for n, view in trace.views.items() if view.sliced and not view.cast}

    # First pass: the steps of each segment, where it may use all that earlier ones
    # computed, and the activations that it does use.
    known, positions, uses = set(given), [], []
    for own in ordered:
        wanted = [own[0].source.value]
        steps = program_.needed(flat, wanted, known.__contains__)
        positions.append(steps)
        inputs = program_.subgraph(flat, steps, wanted).inputs
        uses.append({n for n in inputs if n in flat.varying})
        known |= _computed(flat, steps) & flat.varying

    # Second pass, now that all uses are known: what each segment hands on.
    segments = []
    for k, own in enumerate(ordered):
        later = frozenset().union(*uses[k + 1 :])
        value = own[0].source.value
        outputs = sorted(_computed(flat, positions[k]) & (later | {value}))
        part = program_.subgraph(flat, positions[k], outputs)
        segments.append(Segment(own[0].source, tuple(own), part, later))
    return segments


def layers(segments: Sequence[Segment]) -> list[range]:
    """The segments of each layer, where equal layers follow each other.

    A layer's first segment begins in what comes before it, and may be another program
    in the first layer; all its other segments have the steps of the next layer's. What
    is handed on may differ: nothing after the last layer needs its residual.

    Args:
      segments: of a program, in order.

    Returns:
      Positions, in order; a segment that repeats nothing, or only itself, is alone.
    """
    # A layer's first segment begins in what comes before it, and may be another program
    # in the first layer; all its other segments have the steps of the next layer's.
    # What is handed on may differ: nothing after the last layer needs its residual. A
    # segment that repeats nothing, or only itself, is alone.
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(s.subgraph.form, len(numbers)) for s in segments]
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
    """After how many segments those behind the first come again; 1 where never."""
    rest = kinds[start + 1 :]
    if rest[:1] == rest[1:2]:
        return 1
    for period in range(2, len(rest) // 2 + 2):
        inner, after = rest[: period - 1], rest[period : 2 * period - 1]
        if inner == after:
            return period
    return 1


def _computed(flat: Program, positions: set[int]) -> set[int]:
    """The values that some steps compute."""
    return {n for i in positions for n in flat.steps[i].outputs}


def _tables(flat: Program) -> set[int]:
    """The constants that are worth computing once.

    Not those that are only made larger, which costs less to compute than to read, and
    nothing large.
    """
    cheap = {
        n
        for step in flat.steps
        if step.primitive.name in ("broadcast_in_dim", "iota", "reshape")
        for n in step.outputs
    }
    return {n for n in flat.constants - cheap if _bytes(flat.kinds[n]) <= _TABLE}


def _bytes(kind: Any) -> float:
    plain = isinstance(getattr(kind, "dtype", None), np.dtype)  # no random key
    return int(kind.size) * kind.dtype.itemsize if plain else math.inf
