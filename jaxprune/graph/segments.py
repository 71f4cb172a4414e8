"""A traced program cut into segments, each of which ends at an input of linear ops.

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
from jaxprune.graph.linear_ops import LinearOp, Trace
from jaxprune.graph.operands import Input
from jaxprune.graph.program import Program, Subgraph

_TABLE = 2**24  # bytes: larger tables are computed again for each batch


@dataclasses.dataclass(frozen=True)
class Segment:
    """The steps to one input.

    Attributes:
      source: the input that it ends at.
      linear_ops: the linear ops whose input it is, in the order of the program.
      subgraph: steps from earlier activations to the input and to what later segments
        need.
      later: the activations that later segments need.
    """

    source: Input
    linear_ops: tuple[LinearOp, ...]
    subgraph: Subgraph
    later: frozenset[int]


def cut_at_inputs(trace: Trace, linear_ops: Sequence[LinearOp]) -> list[Segment]:
    """The segments of a program, in order; each computes what none before it has.

    Args:
      trace: the program.
      linear_ops: the linear ops whose inputs end a segment.

    Returns:
      A segment for each input that ends one, in the order of the program.
    """
    flat = trace.program
    groups: dict[int, list[LinearOp]] = {}
    for op in linear_ops:
        groups.setdefault(op.input, []).append(op)
    ordered = sorted(groups.values(), key=lambda ops: ops[0].step)

    # First pass: the steps of each segment, where it may use all that earlier ones
    # computed, and the activations that it does use.
    known, positions, uses = _inputs_of_every_segment(trace), [], []
    for ops in ordered:
        source = ops[0].source.values
        steps = program_.steps_to(flat, source, known.__contains__)
        positions.append(steps)
        inputs = program_.subgraph(flat, steps, source).inputs
        uses.append({n for n in inputs if n in flat.varying})
        known |= _computed(flat, steps) & flat.varying

    # Second pass, now that all uses are known: what each segment hands on.
    segments = []
    for k, ops in enumerate(ordered):
        later = frozenset().union(*uses[k + 1 :])
        read = {*ops[0].source.values}
        values = _computed(flat, positions[k]) & (later | read)
        values |= read - flat.varying  # sizes of groups may be given once for all
        part = program_.subgraph(flat, positions[k], sorted(values))
        segments.append(Segment(ops[0].source, tuple(ops), part, later))
    return segments


def layer_ranges(segments: Sequence[Segment]) -> list[range]:
    """The segments of each layer, where equal layers follow each other.

    A layer's first segment begins in what comes before it, and may be another program
    in the first layer; all its other segments have the steps of the next layer's. What
    is handed on may differ: nothing after the last layer needs its residual.

    Args:
      segments: all segments of a program, in order.

    Returns:
      Positions, in order; a segment that repeats nothing, or only itself, is alone.
    """
    # Each segment as the number of its form; a layer is a period of these numbers.
    numbers: dict[Any, int] = {}
    forms = [numbers.setdefault(s.subgraph.form, len(numbers)) for s in segments]
    ranges: list[range] = []
    start, period = 0, 1
    while start < len(forms):
        # The first segment of a layer may differ, so the inner ones are compared.
        inner = forms[start + 1 : start + period]
        before = forms[start - period + 1 : start]
        if period == 1 or inner != before:
            period = _period(forms, start)
        ranges.append(range(start, start + period))
        start += period
    return ranges


def _period(forms: Sequence[int], start: int) -> int:
    """After how many segments those behind the first come again; 1 where never."""
    behind = forms[start + 1 :]
    if behind[:1] == behind[1:2]:
        return 1
    for period in range(2, len(behind) // 2 + 2):
        inner, after = behind[: period - 1], behind[period : 2 * period - 1]
        if inner == after:
            return period
    return 1


def _inputs_of_every_segment(trace: Trace) -> set[int]:
    """What every segment is given: whole leaves, the batch, constants, slices."""
    # Slices of leaves, but not casts of them, which are cheaper to make again than to
    # hold.
    flat = trace.program
    numbers = {*flat.leaves, *flat.batch, *flat.closed_over, *_tables(flat)}
    return numbers | {n for n, v in trace.views.items() if v.sliced and not v.cast}


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
    return {n for n in flat.constants - cheap if _bytes(flat.avals[n]) <= _TABLE}


def _bytes(aval: Any) -> float:
    is_array = isinstance(getattr(aval, "dtype", None), np.dtype)  # no random key
    return int(aval.size) * aval.dtype.itemsize if is_array else math.inf
