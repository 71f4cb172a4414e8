"""Whether a smaller module gives what the whole one gives with zeros.

Where it does not, an attribute that holds a size was not set, or cannot be: the error
names the first part of the module whose output differs or that fails.
"""

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.arrays.messages import first_line, listed
from jaxprune.graph.axis_groups import AxisGroup
from jaxprune.structured.output_difference import relative_difference
from jaxprune.torch import conversion
from jaxprune.torch.calls import arguments, evaluating, running_parts
from jaxprune.torch.environment import torch, torch_tree

TOLERANCE = 1e-5
"""Largest difference, relative to the largest entry, of outputs in 32 bits."""


# More than this no rounding explains.
_ROUNDING = 1e-2


class _Trouble(NamedTuple):
    """Where a smaller module goes wrong.

    Attributes:
      part: name of the first part that fails or differs.
      reason: what is wrong with it.
    """

    part: str
    reason: str


def check_equal_outputs(
    module: Any,
    small: Any,
    zeroed: Mapping[str, Any],
    example: Any,
    groups: Iterable[AxisGroup],
) -> float:
    """Runs a smaller module beside the whole one with zeros.

    Args:
      module: the whole module.
      small: the smaller one.
      zeroed: {name: tensor} of the whole module, zero where units were removed.
      example: what both are called with.
      groups: groups that lost units, for the error.

    Returns:
      The largest difference of their outputs, relative to the largest entry.

    Raises:
      ValueError: the smaller module fails, or its outputs differ.
    """
    reference = outputs(module, example, zeroed)
    try:
        results = outputs(small, example)
    except Exception as failure:
        trouble = _Trouble(_failing_part(small, example), first_line(failure))
        raise _refusal(trouble, groups) from failure
    difference = module_difference(results, reference)
    # Half precision rounds the two, whose sums are of other lengths, apart.
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(reference)]
    epsilons = [
        float(jax.numpy.finfo(dtype).eps)
        for dtype in dtypes
        if jax.numpy.issubdtype(dtype, np.inexact)
    ]
    rounding = max([_ROUNDING, *(8 * epsilon for epsilon in epsilons)])
    # Many layers add up their rounding; in 64 bits only a wrong size is left.
    if not difference <= TOLERANCE and not (
        difference < rounding and _equal_in_64_bits(module, small, zeroed, example)
    ):
        part = _differing_part(module, small, zeroed, example)
        reason = f"its outputs differ by {difference:.1e}"
        raise _refusal(_Trouble(part, reason), groups)
    return difference


def _equal_in_64_bits(
    module: Any, small: Any, zeroed: Mapping[str, Any], example: Any
) -> bool:
    """Whether the two give the same where all that they compute is in 64 bits."""
    wide_example = torch_tree.tree_map(_wide, example)
    reference = outputs(
        copy.deepcopy(module).double(),
        wide_example,
        torch_tree.tree_map(_wide, dict(zeroed)),
    )
    results = outputs(copy.deepcopy(small).double(), wide_example)
    return module_difference(results, reference) <= TOLERANCE


def _wide(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def outputs(module: Any, example: Any, tensors: Mapping[str, Any] | None = None) -> Any:
    """What a module gives in eval mode.

    Args:
      module: torch module.
      example: what it is called with; see `jp.torch.function`.
      tensors: {name: tensor} in the place of its own, or None.

    Returns:
      Arrays in the containers that `jp.torch.function` gives.
    """
    args, kwargs = arguments(example)
    with torch.no_grad(), evaluating(module):
        result = torch.func.functional_call(module, dict(tensors or {}), args, kwargs)
    return conversion.as_result(result)


def module_difference(results: Any, reference: Any) -> float:
    """The largest difference of what two modules give, relative to the largest entry.

    Args:
      results: pytree of arrays.
      reference: pytree of arrays.

    Returns:
      See `relative_difference`; infinite too where structures differ.
    """
    structures: list[Any] = [jax.tree.structure(x) for x in (results, reference)]
    # A model that returns fewer values for another size would be compared in part.
    if structures[0] != structures[1]:
        return float("inf")
    return relative_difference(results, reference)


def _failing_part(module: Any, example: Any) -> str:
    """The innermost part of a module that fails, where it is known."""
    with running_parts(module) as running, contextlib.suppress(Exception):
        outputs(module, example)
    return running[-1] if running else ""


def _differing_part(
    module: Any, small: Any, zeroed: Mapping[str, Any], example: Any
) -> str:
    """The first part whose output differs, of those whose outputs have one shape."""
    # In the order in which parts end, so the first that differs is the innermost.
    small_outputs = _outputs_by_part(small, example, None)
    for name, reference in _outputs_by_part(module, example, zeroed).items():
        difference = module_difference(small_outputs.get(name), reference)
        if TOLERANCE < difference < float("inf"):
            return name
    return ""


def _outputs_by_part(
    module: Any, example: Any, tensors: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What each part gives, by its name, in the order in which they end."""
    by_part: dict[str, Any] = {}
    handles = [
        part.register_forward_hook(
            lambda _, __, output, name=name: by_part.update(
                {name: conversion.as_result(output)}
            )
        )
        for name, part in module.named_modules()
    ]
    try:
        outputs(module, example, tensors)
    finally:
        for handle in handles:
            handle.remove()
    return by_part


def _refusal(trouble: _Trouble, groups: Iterable[AxisGroup]) -> Exception:
    # What fails is a part, or what calls it: the groups in the nearest that has any.
    part, near = trouble.part, _kinds_inside(trouble.part, groups)
    while part and not near:
        part = part.rpartition(".")[0]
        near = _kinds_inside(part, groups)
    return ValueError(
        "a smaller module needs its sizes in attributes that can be set, but "
        f"{trouble.part or 'the module itself'!r} cannot have them ({trouble.reason}); "
        f"keep all units of {listed(near)}, before other rules of keep=, or "
        "shrink the function with jp.shrink, which needs no class"
    )


def _kinds_inside(part: str, groups: Iterable[AxisGroup]) -> list[str]:
    prefix = f"{part}." if part else ""
    kinds = [
        group.kind
        for group in groups
        if any(member.leaf.startswith(prefix) for member in group.members)
    ]
    return list(dict.fromkeys(kinds))
