"""The statistics of a dense model's inputs, over calibration batches.

`calibrate` takes batches through the same pipeline as `jp.prune_trained`, and prunes
nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.messages import listed
from jaxprune.graph.linear_ops import LinearOp, Trace, trace
from jaxprune.posttraining.input_statistics import InputStatistics, Sums
from jaxprune.posttraining.pipeline import SegmentedProgram, SequentialPipeline
from jaxprune.typing import Params, Prunable


def calibrate(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    hessian: bool = False,
    positions: Callable[[Any], jax.Array] | None = None,
    prunable: Prunable = tree.prunable,
) -> dict[str, InputStatistics]:
    """The statistics of every linear op's input, over batches, by the dense model.

    One batch is in memory at a time. Batches of another shape are traced anew.

    Args:
      fn: parameters and a batch to anything.
      params: the parameters; `jp.LazyArray` leaves are read anew for each batch.
      batches: pytrees of arrays.
      hessian: whether to add up X^T X as well, in^2 floats for each input.
      positions: a batch to booleans of the shape of the samples, (batch, time) say:
        which positions count. None counts all.
      prunable: which leaves are of interest.

    Returns:
      Name of the weight to the statistics of its input; of a weight used more than
      once, over all uses that see it the same way.

    Raises:
      ValueError: there is no batch or no linear op, an input is not finite, or
        positions do not have the shape of an input's samples.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: x @ params["w"]
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> jp.calibrate(fn, {"w": jnp.ones((2, 3))}, batches)["w"].mean_square.tolist()
      [[5.0, 2.0]]
    """
    programs: dict[Any, SegmentedProgram] = {}
    sums = Sums(hessian=hessian)
    for batch in batches:
        if (kind := kind_of(batch)) not in programs:
            traced = trace(fn, params, batch)
            ops = chosen(traced, params, prunable)
            leaves = Leaves(jax.tree.leaves(params))
            programs[kind] = SegmentedProgram(traced, leaves, ops)
        program = programs[kind]
        counted = None if positions is None else positions(batch)
        pipeline = SequentialPipeline(program, [batch], [counted], sums)
        for number in range(len(program.segments)):
            pipeline.observe(range(number, number + 1))
            program.release(number)
    if not programs:
        raise ValueError("calibrate needs at least one batch, got none")
    return sums.finish_all()


def kind_of(batch: Any) -> Any:
    """Structure, shapes and dtypes of a batch, to compare."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)


def checked_batches(batches: Iterable[Any], caller: str) -> list[Any]:
    """All batches, of one shape.

    Args:
      batches: pytrees of arrays.
      caller: the function that needs them, for the sentence.

    Returns:
      A list of its own.

    Raises:
      ValueError: there is none, or their structures, shapes or dtypes differ.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(f"{caller} needs at least one batch, got none")
    first = kind_of(batches[0])
    odd = [i for i, x in enumerate(batches) if kind_of(x) != first]
    if odd:
        raise ValueError(
            "all batches must have the shapes and dtypes of the first, but those at "
            f"{listed(odd)} differ; drop the incomplete last batch, or cut all "
            "sequences to one length"
        )
    return batches


def chosen(traced: Trace, params: Params, prunable: Prunable) -> list[LinearOp]:
    """The linear ops whose weights may be pruned.

    Args:
      traced: the function's linear ops.
      params: the parameters.
      prunable: which leaves may be pruned.

    Returns:
      Linear ops, in order.

    Raises:
      ValueError: there is none, or a rule excludes what is not there.
    """
    named = tree.named_leaves(params)
    tree.check_rule(prunable, list(named))
    found = [op for op in traced.linear_ops if prunable(op.leaf, named[op.leaf])]
    first = {op.name: op.view for op in found if op.use == 0}
    # Another use of a tied weight counts where it sees the weight the same way.
    found = [op for op in found if op.view == first[op.name]]
    if not found:
        seen = sorted({op.leaf for op in traced.linear_ops})
        raise ValueError(
            "some matmul or convolution of a prunable leaf with an activation must be "
            f"seen, but there is none; seen are {listed(seen) or 'none'}, unseen "
            f"{dict(list(traced.unseen.items())[:6])}; give prunable=lambda name, "
            "leaf: ..., or write the function so that the leaf enters it as it is"
        )
    return found
