"""What a refinement trains of each block, and what it needs to train anything."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining.passes.refinement import Refine
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram


class Value(NamedTuple):
    """Something that a block trains.

    Attributes:
      number: number of the value in the program.
      leaf: path name of the leaf.
      view: view of the leaf, or of the part of it that the block reads.
      is_pruned: whether its zeros stay zeros.
    """

    number: int
    leaf: str
    view: WeightView
    is_pruned: bool


def trained_values(program: SegmentedProgram) -> list[list[Value]]:
    """What each block trains: pruned weights, and vectors, that it alone reads."""
    views, types = program.trace.views, program.trace.program.avals
    names = {i: name for name, i in program.trace.leaves.items()}
    # Before the first block there are steps of the first segment.
    parts = [program.segments[0].subgraph, *program.blocks]
    reads = [{n for n in part.inputs if n in views} for part in parts]
    readers = {(i, n) for i, numbers in enumerate(reads) for n in numbers}

    def alone(block: int, number: int) -> bool:
        return all(
            views[number].is_apart(views[n])
            for i, n in readers
            if views[n].leaf == views[number].leaf and (i, n) != (block, number)
        )

    # Of all layers: a branch of an earlier one may be computed with a later block.
    finished = map(program.finished_in, program.segments)
    pruned = [op.view for ops in finished for op in ops]
    matrices = [op.view for op in program.trace.linear_ops]

    def value(number: int) -> Value | None:
        view = views[number]
        is_weight = any(not weight.is_apart(view) for weight in pruned)
        # A matrix of one output is no vector.
        is_vector = sum(size > 1 for size in view.shape) <= 1
        is_vector = is_vector and all(matrix.is_apart(view) for matrix in matrices)
        floating = jnp.issubdtype(types[number].dtype, jnp.floating)
        if not floating or not (is_weight or is_vector):
            return None
        return Value(number, names[view.leaf], view, is_weight)

    return [
        [
            trained
            for number in parts[i].inputs  # in order of first use
            if number in reads[i] and alone(i, number)
            if (trained := value(number)) is not None
        ]
        for i in range(1, len(parts))
    ]


def check_refinable(
    refine: Refine,
    program: SegmentedProgram,
    positions: Sequence[jax.Array | None],
) -> None:
    """Refuses what nothing can be trained or measured by.

    Args:
      refine: how blocks are refined.
      program: the program, with its blocks.
      positions: booleans for each batch, which samples count, or None for all.

    Raises:
      ValueError: there are too few batches, no result is a float that depends on the
        batch, no weight is a layer's own, or no position counts in the batches that
        train or measure.
    """
    begin, counts = refine.split(len(positions)), list(map(counts_any, positions))
    types = program.trace.program.avals
    results = program.blocks[-1].outputs
    check(
        _REFINABLE,
        floats=any(jnp.issubdtype(types[n].dtype, jnp.floating) for n in results),
        trained=any(trained_values(program)),
        counts=any(counts[:begin]) and any(counts[begin:]),
    )


_REFINABLE = [
    Rule(
        lambda v: v.floats,
        "refine measures the last layer by what the function returns, so some result "
        "must be a float that the weights decide, but none is",
        "let it return the model's final states",
    ),
    Rule(
        lambda v: v.trained,
        "refine finds nothing to train, since several layers read each weight, as they "
        "do of a stack that is cast before it is sliced",
        "cast it inside of the scan, or leave refine out",
    ),
    Rule(
        lambda v: v.counts,
        "refine trains on the first batches and measures by the last, but positions "
        "counts nothing in one of the two",
        "put them in another order, or change held_out",
    ),
]


def counts_any(positions: jax.Array | None) -> bool:
    """Whether anything counts in a batch."""
    return positions is None or bool(jnp.any(positions))
