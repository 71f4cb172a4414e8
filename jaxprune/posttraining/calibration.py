"""The statistics of a dense model's inputs, over calibration batches.

`calibrate` takes batches through the same pipeline as `jp.prune_trained`, and prunes
nothing.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.messages import listed
from jaxprune.arrays.per_device import PerDevice, in_groups
from jaxprune.graph.linear_ops import LinearOp, Trace, trace
from jaxprune.leaves import check_rule
from jaxprune.posttraining import input_statistics
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
    prunable: Prunable = leaves.prunable,
    mesh: jax.sharding.Mesh | None = None,
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
      mesh: devices that take as many batches side by side, as for `jp.prune_trained`;
        all batches are of one shape then, and read at once.

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
    devices = None if mesh is None else PerDevice.of(mesh)
    sums = Sums(hessian=hessian, devices=devices)
    if devices is not None:
        batches = checked_batches(batches, "calibrate")
        check_devices(batches, devices, "calibrate")
    for group in in_groups(batches, devices.count if devices else 1):
        # One program for all batches of a shape; the last batch may be shorter.
        if (kind := kind_of(group[0])) not in programs:
            traced = trace(fn, params, group[0])
            ops = chosen(traced, params, prunable)
            leaves = Leaves(jax.tree.leaves(params))
            programs[kind] = SegmentedProgram(traced, leaves, ops, devices=devices)
        program = programs[kind]
        counted = [None if positions is None else positions(batch) for batch in group]
        for segment, each in itertools.product(program.segments, counted):
            input_statistics.counted_samples(segment, each)
        own = side_by_side(list(group), devices), side_by_side(counted, devices)
        pipeline = SequentialPipeline(program, *own, sums)
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


def check_devices(batches: Sequence[Any], devices: PerDevice, caller: str) -> None:
    """Refuses batches that devices cannot take one each, or that lie elsewhere.

    Args:
      batches: all of them.
      devices: of the mesh.
      caller: the function that needs them, for the sentence.

    Raises:
      ValueError: the number of devices does not divide that of the batches, or a batch
        is spread over several processes.
    """
    if len(batches) % devices.count:
        raise ValueError(
            f"each device of the mesh takes a batch, so {caller} needs a number of "
            f"batches divisible by {devices.count}, got {len(batches)}; give more "
            "batches, or a smaller mesh"
        )
    leaves = jax.tree.leaves(batches)
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves):
        raise ValueError(
            f"with a mesh {caller} splits the batches itself, but some are spread over "
            "processes already; give each process all of them, as NumPy arrays"
        )


def side_by_side(items: Sequence[Any], devices: PerDevice | None) -> list[Any]:
    """Batches or positions as they are, or stacked, as many as there are devices."""
    return list(items) if devices is None else devices.in_turn(items)


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
    check_rule(prunable, list(named))
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
