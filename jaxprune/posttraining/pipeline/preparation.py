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
from jaxprune.arrays.rules import Rule, check
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
    check(_LIST, caller=caller, batches=batches)
    batches = list(batches)
    tensors = [x for x in jax.tree.leaves(batches) if tree.is_torch(x)]
    check(_ARRAYS, caller=caller, tensors=tensors)
    signatures = list(map(batch_signature, batches))
    leaves = jax.tree.leaves(batches)
    check(
        _BATCHES,
        caller=caller,
        count=len(batches),
        odd=listed(i for i, x in enumerate(signatures) if x != signatures[0]),
        devices=devices.count if devices else 1,
        spread=devices is not None
        and any(
            isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves
        ),
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
    check(
        _PRUNABLE,
        ops=ops,
        leaves=listed(sorted({op.leaf for op in traced.linear_ops})) or "none",
        unseen=dict(list(traced.unseen.items())[:6]),
    )
    traced.warn_of_unseen(ops, rule, stacklevel=5)
    return ops


_LIST = [
    Rule(
        lambda v: not (isinstance(v.batches, Mapping) or hasattr(v.batches, "shape")),
        "{caller} takes a list of batches, but got one batch",
        "write [batch], or list(batches) where each row of an array is one",
        error=TypeError,
    )
]
_ARRAYS = [
    Rule(
        lambda v: not v.tensors,
        "{caller} takes batches of JAX or NumPy arrays, but got torch's",
        "write jp.torch.as_arrays(batch)",
        error=TypeError,
    )
]
_BATCHES = [
    Rule(lambda v: v.count, "{caller} needs at least one batch, got none"),
    Rule(
        lambda v: not v.odd,
        "all batches must have the shapes and dtypes of the first, but those at {odd} "
        "differ",
        "drop the incomplete last batch, or cut all sequences to one length",
    ),
    Rule(
        lambda v: v.count % v.devices == 0,
        "each device of the mesh takes a batch, so {caller} needs a number of batches "
        "divisible by {devices}, got {count}",
        "give more batches, or a smaller mesh",
    ),
    Rule(
        lambda v: not v.spread,
        "with a mesh {caller} splits the batches itself, but some are spread over "
        "processes already",
        "give each process all of them, as NumPy arrays",
    ),
]
_PRUNABLE = [
    Rule(
        lambda v: v.ops,
        "some matmul or convolution of a prunable leaf with an activation must be "
        "seen, but there is none; seen are {leaves}, unseen {unseen}",
        "give prunable=lambda name, leaf: ..., or write the function so that the leaf "
        "enters it as it is",
    )
]
