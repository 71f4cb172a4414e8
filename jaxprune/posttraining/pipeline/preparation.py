"""From a function, parameters and batches to what goes through the segments."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.messages import listed
from jaxprune.arrays.per_device import PerDevice
from jaxprune.graph.linear_ops import LinearOp, Trace, trace
from jaxprune.leaves import checked_rule
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.typing import Params, PrunableLike


def batch_signature(batch: Any) -> Any:
    """Structure, shapes and dtypes of a batch, to compare."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)


def check_batches(
    batches: Iterable[Any], caller: str, devices: PerDevice | None = None
) -> list[Any]:
    """All batches, of one shape, as many as devices can take one each.

    Args:
      batches: pytrees of arrays.
      caller: name of the function that needs them, for the sentence.
      devices: devices of the mesh, or None.

    Returns:
      A new list.

    Raises:
      TypeError: it is one batch in the place of a list, or a batch has torch's tensors.
      ValueError: there is none, their structures, shapes or dtypes differ, the number
        of devices does not divide theirs, or one is spread over several processes.
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"{caller} takes a list of batches, but got one batch; write [batch], or "
            "list(batches) where each row of an array is one"
        )
    batches = list(batches)
    tensors = [x for x in jax.tree.leaves(batches) if tree.is_torch(x)]
    if tensors:
        raise TypeError(
            f"{caller} takes batches of JAX or NumPy arrays, but got torch's; write "
            "jp.torch.as_arrays(batch)"
        )
    signatures = list(map(batch_signature, batches))
    leaves = jax.tree.leaves(batches)
    count = len(batches)
    odd = listed((i for i, x in enumerate(signatures) if x != signatures[0]))
    spread = devices is not None and any(
        isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves
    )
    if not count:
        raise ValueError(f"{caller} needs at least one batch, got none")
    if odd:
        raise ValueError(
            "all batches must have the shapes and dtypes of the first, but those at "
            f"{odd} differ; drop the incomplete last batch, or cut all sequences to "
            "one length"
        )
    if count % (devices.count if devices else 1) != 0:
        raise ValueError(
            f"each device of the mesh takes a batch, so {caller} needs a number of "
            f"batches divisible by {devices.count if devices else 1}, got {count}; "
            "give more batches, or a smaller mesh"
        )
    if spread:
        raise ValueError(
            f"with a mesh {caller} splits the batches itself, but some are spread over "
            "processes already; give each process all of them, as NumPy arrays"
        )
    return batches


def prepare(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batch: Any,
    prunable: PrunableLike,
    *,
    devices: PerDevice | None = None,
) -> SegmentedProgram:
    """A function, cut at the inputs of the weights that may be pruned.

    Args:
      fn: function of parameters and a batch to anything.
      params: the parameters.
      batch: one batch, of the shape of all.
      prunable: which leaves may be pruned.
      devices: devices that take a batch each, or None.

    Returns:
      The segments, with the parameters' leaves.

    Raises:
      ValueError: no weight may be pruned, or a rule excludes what is not there.
    """
    traced = trace(fn, params, batch)
    ops = prunable_ops(traced, params, prunable)
    leaves = Leaves(jax.tree.leaves(params))
    return SegmentedProgram(traced, leaves, ops, devices=devices)


def prunable_ops(
    traced: Trace, params: Params, prunable: PrunableLike
) -> list[LinearOp]:
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
    leaves = tree.named_leaves(params)
    rule = checked_rule(prunable, list(leaves))
    ops = [op for op in traced.linear_ops if rule(op.leaf, leaves[op.leaf])]
    first = {op.name: op.view for op in ops if op.use == 0}
    # Another use of a tied weight counts where it sees the weight the same way.
    ops = [op for op in ops if op.view == first[op.name]]
    if not ops:
        raise ValueError(
            "some matmul or convolution of a prunable leaf with an activation must be "
            "seen, but there is none; seen are "
            f"{listed(sorted({op.leaf for op in traced.linear_ops})) or 'none'}, "
            f"unseen {dict(list(traced.unseen.items())[:6])}; give prunable=lambda "
            "name, leaf: ..., or write the function so that the leaf enters it as it "
            "is"
        )
    traced.warn_of_unseen(ops, rule, stacklevel=5)
    return ops
