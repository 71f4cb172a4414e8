"""A smaller torch module: whole heads, neurons and channels out of any architecture.

The units are those of the traced program, so no module class has to be known to find
them. What the program cannot say is where a class keeps its sizes; see `layer_sizes`.
Whether all of them were set is checked by running the smaller module beside the whole
one with the same units zeroed.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune.graph.axis_groups import AxisGroup
from jaxprune.posttraining import shrink as shrink_function
from jaxprune.posttraining.passes.base import Pass
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.shrink import ShrinkResult
from jaxprune.structured.sizes import Keep, Rules, Sizes
from jaxprune.torch import conversion
from jaxprune.torch.comparison import check_equal_outputs
from jaxprune.torch.layer_sizes import (
    Attributes,
    smaller_sizes,
    without_configuration,
)
from jaxprune.torch.module_function import Arrays, function
from jaxprune.torch.resizing import as_tensors, replace_tensors, set_attributes
from jaxprune.typing import Masks, Params, Scores


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
    choose: Scores | Masks | Callable[[Params], Scores] | Pass | str,
    keep: Keep | None = None,
    *,
    batches: Iterable[Any] | None = None,
    groups: Rules = ("*",),
    sizes: Sizes | None = None,
    positions: Callable[[Any], jax.Array] | None = None,
    directory: str | Path | None = None,
) -> ShrunkModule:
    """Removes whole units of a torch module; see `jp.shrink`, which chooses them.

    Args:
      module: any module that `jp.torch.function` takes.
      example: what it is called with; see `jp.torch.function`.
      choose: {torch name: scores or masks of a parameter}, a criterion such as
        `jp.scores.magnitude`, or a solver such as "sparsegpt"; see `jp.shrink`. What
        has no scores, or what a rule `prunable` leaves out, as norms, biases and output
        heads by default, has no say.
      keep: what stays of the units of each group, or of the model; see `jp.shrink`.
        `print(jp.axis_groups(fn, params, batch))` shows the groups.
      batches: examples of one shape for a solver; None is the example alone.
      groups: the groups that a budget is met with; see `jp.shrink`.
      sizes: the numbers of units that groups may keep; see `jp.shrink`.
      positions: the positions that count for a solver; see `jp.shrink`.
      directory: directory where a solver keeps its progress; see `jp.shrink`.

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
      ...     module, torch.ones(3, 4), jp.scores.magnitude, keep=0.5)
      >>> small[0]
      Linear(in_features=4, out_features=4, bias=True)
      >>> report["attributes"]["2"]
      {'in_features': 4}
    """
    fn, params = function(module, example)
    if callable(choose):
        choose = choose(params)
    # Buffers are leaves here, so that it is known how they are cut.
    leaves = {**params, **_cuttable_buffers(module)}
    if isinstance(choose, Mapping):
        choose = {**dict.fromkeys(leaves, optax.MaskedNode()), **choose}
    result = shrink_function.shrink(
        fn,
        leaves,
        map(conversion.as_arrays, [example] if batches is None else batches),
        choose,
        keep,
        groups=groups,
        sizes=sizes,
        positions=positions,
        directory=directory,
    )
    groups_cut = [g for g in result.fn.groups if g.name in result.report["groups"]]
    units = _units_by_leaf(groups_cut, result.report["groups"])
    attributes = smaller_sizes(module, result.fn.cuts, units)
    zeroed = _zeroed(module, result)
    # A configuration is left alone where the forward pass does not read it: it says
    # how a module is made, and none is made with heads of other sizes.
    choices = [without_configuration(attributes), attributes]
    for chosen in choices[choices[0] == choices[1] :]:
        small = _smaller_copy(module, result, chosen)
        try:
            error = check_equal_outputs(module, small, zeroed, example, groups_cut)
        except ValueError:
            if chosen is attributes:
                raise
        else:
            break
    report = {**result.report, "attributes": chosen, "error": error}
    return ShrunkModule(small, report)


def _cuttable_buffers(module: Any) -> Arrays:
    """Buffers that may have units of a group, as the statistics of a batch norm do."""
    return {
        name: conversion.as_array(buffer)
        for name, buffer in module.named_buffers()
        # Integers are positions and counters, which no unit has.
        if buffer.is_floating_point() and buffer.ndim
    }


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
