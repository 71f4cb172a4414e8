"""A smaller torch module: whole heads, neurons and channels out of any architecture.

The units are those of the traced program, so no module class has to be known to find
them. What the program cannot say is where a class keeps its sizes; see `layer_sizes`.
Whether all of them were set is checked by running the smaller module beside the whole
one with the same units zeroed.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend.core import jaxpr_as_fun

from jaxprune.graph.axis_groups import AxisGroup, axis_groups
from jaxprune.posttraining import shrink as shrink_function
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.shrink import ShrinkResult
from jaxprune.torch import conversion
from jaxprune.torch.comparison import check_equal_outputs
from jaxprune.torch.layer_sizes import (
    Attributes,
    smaller_sizes,
    without_configuration,
)
from jaxprune.torch.module_function import Arrays, function
from jaxprune.torch.resizing import as_tensors, replace_tensors, set_attributes
from jaxprune.typing import Params, Scores


class ShrunkModule(NamedTuple):
    """A smaller torch module and the report of what was removed.

    Attributes:
      module: the smaller module, of the same classes; the original is as it was.
      report: JSON-able, as that of `jp.shrink`, and "attributes": for each part of the
        module the attributes that were set, and "error": the largest difference of its
        outputs from those of the zeroed module, relative to their largest entry.
    """

    module: Any
    report: dict[str, Any]


def shrink(
    module: Any,
    example: Any,
    scores: Scores | Callable[[Params], Scores] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    masks: Mapping[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
    **arguments: Any,
) -> ShrunkModule:
    """Removes whole units of a torch module; see `jp.shrink`, which chooses them.

    Args:
      module: any module that `jp.torch.function` takes.
      example: what it is called with; see `jp.torch.function`.
      scores: {torch name: scores of a parameter}, or a criterion as
        `jp.scores.magnitude`, which is given the parameters. What has none, or what a
        rule `prunable` leaves out, as norms, biases and output heads by default, has no
        say.
      sparsity: share of its units that each group loses, or {glob, kind or name of a
        group: share}; `print(jp.axis_groups(fn, params, batch))` shows the groups.
      masks: {torch name: booleans}, in the place of scores.
      batches: examples of one shape, in the place of scores: the solver chooses, and
        the weights that are left make up for those that are gone.
      **arguments: `budget`, `groups`, `sizes` and settings of the choice by batches, as
        `jp.shrink` takes them.

    Returns:
      The smaller module and a report.

    Raises:
      ValueError: arguments disagree, as `jp.shrink` says, or the class of a part of the
        module cannot have the smaller sizes; the sentence names the part.
      TypeError: the module cannot be traced; see `jp.torch.function`.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> small, report = jp.torch.shrink(
      ...     module, torch.ones(3, 4), jp.scores.magnitude, 0.5)
      >>> small[0]
      Linear(in_features=4, out_features=4, bias=True)
      >>> report["attributes"]["2"]
      {'in_features': 4}
    """
    fn, params = function(module, example)
    batch = conversion.as_arrays(example)
    buffers = _cuttable_buffers(module)
    # Buffers are leaves here, so that it is known how they are cut.
    leaves = {**params, **buffers}
    fn = _traced_once(fn, leaves, batch)
    result = shrink_function.shrink(
        fn,
        leaves,
        batch,
        _for_all(scores(params) if callable(scores) else scores, leaves),
        sparsity,
        masks=_for_all(masks, leaves),
        batches=None if batches is None else map(conversion.as_arrays, batches),
        **arguments,
    )
    # Again, for the members of the groups; the program is at hand by now.
    groups = [
        group
        for group in axis_groups(fn, leaves, batch)
        if group.name in result.report["groups"]
    ]
    units = _units_by_leaf(groups, result.report["groups"])
    attributes = smaller_sizes(module, result.fn.cuts, units)
    zeroed = _zeroed(module, result)
    # A configuration is left alone where the forward pass does not read it: it says
    # how a module is made, and none is made with heads of other sizes.
    choices = [without_configuration(attributes), attributes]
    for chosen in choices[choices[0] == choices[1] :]:
        small = _smaller_copy(module, result, chosen)
        try:
            error = check_equal_outputs(module, small, zeroed, example, groups)
        except ValueError:
            if chosen is attributes:
                raise
        else:
            break
    report = {**result.report, "attributes": chosen, "error": error}
    return ShrunkModule(small, report)


def _traced_once(fn: Callable[[Any, Any], Any], leaves: Any, batch: Any) -> Any:
    """The function as its program for this batch, in which torch has no part.

    It is traced several times here, and torch's operations are slow to trace.
    """
    with jax.disable_jit():  # loops come out unrolled, as `jp.trace` wants them
        program, shapes = jax.make_jaxpr(fn, return_shape=True)(leaves, batch)
    run = jaxpr_as_fun(program)
    structure = jax.tree.structure(shapes)
    return lambda leaves, batch: jax.tree.unflatten(
        structure, run(*jax.tree.leaves((leaves, batch)))
    )


def _cuttable_buffers(module: Any) -> Arrays:
    """Buffers that may have units of a group, as the statistics of a batch norm do."""
    return {
        name: conversion.as_array(buffer)
        for name, buffer in module.named_buffers()
        # Integers are positions and counters, which no unit has.
        if buffer.is_floating_point() and buffer.ndim
    }


def _for_all(values: Any, leaves: Arrays) -> Any:
    """Scores or masks of some parameters, with all others and the buffers left out."""
    left_out = dict.fromkeys(leaves, optax.MaskedNode())
    return {**left_out, **values} if isinstance(values, Mapping) else values


def _units_by_leaf(
    groups: Sequence[AxisGroup], counts: Mapping[str, Mapping[str, int]]
) -> dict[str, list[tuple[int, int]]]:
    """For each leaf the units of the groups that it lost some of, before and after."""
    units: dict[str, list[tuple[int, int]]] = {}
    for group in groups:
        pair = (counts[group.name]["before"], counts[group.name]["after"])
        for member in group.members:
            units.setdefault(member.leaf, []).append(pair)
    return units


def _smaller_copy(module: Any, result: ShrinkResult, attributes: Attributes) -> Any:
    """A copy of the module with the tensors and attributes of the result."""
    small = copy.deepcopy(module)
    # With a solver the weights that are left have new values, also where none is cut.
    replace_tensors(small, as_tensors(result.params))
    set_attributes(small, attributes)
    return small


def _zeroed(module: Any, result: ShrinkResult) -> dict[str, Any]:
    """The tensors of the whole module with zeros for all that was removed."""
    arrays = {
        name: _with_zeros(np.asarray(jax.device_get(array)), result.fn.cuts[name])
        for name, array in result.params.items()
    }
    tensors = {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    # `functional_call` takes tensors that are on the module's devices.
    return {
        name: tensor.to(tensors[name].device)
        for name, tensor in as_tensors(arrays).items()
    }


def _with_zeros(small: np.ndarray, cut: LeafCut) -> np.ndarray:
    """What is left of a leaf at its place in the whole one, zero elsewhere."""
    whole = np.zeros(cut.before, small.dtype)  # the shape before it was cut
    for i, layer_kept in enumerate(cut.kept):
        positions = [
            np.arange(size) if axis_kept is None else axis_kept
            for size, axis_kept in zip(cut.before, layer_kept, strict=True)
        ]
        layer = small
        if cut.stacked is not None:  # fused experts keep other units each
            positions[cut.stacked] = np.array([i])
            layer = np.take(small, [i], cut.stacked)
        whole[np.ix_(*positions)] = layer
    return whole
