"""The statistics of a dense model's inputs, over calibration batches.

`calibrate` takes batches through the same pipeline as `jp.prune_trained`, and prunes
nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxprune import leaves
from jaxprune.arrays.per_device import PerDevice, in_groups
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.typing import Params, PrunableLike


def calibrate(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    hessian: bool = False,
    positions: Callable[[Any], jax.Array] | None = None,
    prunable: PrunableLike = leaves.prunable,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, InputStatistics]:
    """The statistics of every linear op's input, over batches, by the dense model.

    One batch is in memory at a time. Batches of another shape are traced anew.

    Args:
      fn: function of parameters and a batch to anything.
      params: parameters; `jp.LazyArray` leaves are read anew for each batch.
      batches: pytrees of arrays.
      hessian: whether to add up X^T X as well, in^2 floats for each input.
      positions: function of a batch to booleans of the shape of the samples, (batch,
        time) say: which positions count. None counts all.
      prunable: function of a leaf's name and the leaf to whether its inputs count.
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
        batches = preparation.check_batches(batches, "calibrate", devices)
    for group in in_groups(batches, devices.count if devices else 1):
        # One program for all batches of a shape; the last batch may be shorter.
        if (signature := preparation.batch_signature(group[0])) not in programs:
            programs[signature] = preparation.prepare(
                fn, params, group[0], prunable, devices=devices
            )
        program = programs[signature]
        pipeline = SequentialPipeline(program, list(group), positions, sums)
        for number in range(len(program.segments)):
            pipeline.observe(range(number, number + 1))
            program.release(number)
    if not programs:
        raise ValueError("calibrate needs at least one batch, got none")
    return sums.finish_all()
