"""Torch-Pruning's groups of torch models beside ours, group by group.

`python -m benchmarks.torch_model_groups docs/results/torch_model_groups.csv` takes the
models of `benchmarks.torch_zoo`. For each group that `jp.axis_groups` removes units of
by default it looks whether Torch-Pruning's dependency graph has a group of the same
parameters on the same axes. It needs `pip install torch-pruning`; models that are in
the file are not run again.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import torch
import tyro

import jaxprune as jp
from benchmarks import measure, torch_zoo
from benchmarks.torch_models import (
    append_row,
    call_module,
    rows_of,
    sum_of_tensors,
    time_limit,
)

COLUMNS = ("model", "removable", "same", "other", "stopped_at")
Axes = frozenset[tuple[str, int]]
"""Pairs of a parameter and an axis of it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Takes models one after the other.

    Attributes:
      out: CSV file that rows are appended to.
      models: names of `benchmarks.torch_zoo`.
      limit: seconds that one model may take.
    """

    out: Annotated[Path, tyro.conf.Positional]
    models: tuple[str, ...] = tuple(torch_zoo.names())
    limit: int = 300


def main(config: Config) -> None:
    """Takes the models that are not in the file yet."""
    done = {row["model"] for row in rows_of(config.out)}
    pending = [name for name in config.models if name not in done]
    for name in measure.progress(pending, "models", "model"):
        row = {**dict.fromkeys(COLUMNS, ""), "model": name}
        try:
            with time_limit(config.limit):
                row |= compare_groups(*torch_zoo.make(name))
        except Exception as failure:
            reason = (str(failure).strip().splitlines() or [""])[0]
            row["stopped_at"] = f"{type(failure).__name__}: {reason[:200]}"
        append_row(config.out, COLUMNS, row)
        jax.clear_caches()
    rows = [row for row in rows_of(config.out) if not row["stopped_at"]]
    same, removable = (sum(int(r[key]) for r in rows) for key in ("same", "removable"))
    print(f"{same} of {removable} groups of {len(rows)} models are the same")


def compare_groups(module: Any, example: Any) -> dict[str, Any]:
    """How many of our groups Torch-Pruning has too.

    Args:
      module: the module.
      example: what it is called with.

    Returns:
      "removable", the number of our groups; "same", of those that it has; and "other",
      the first that it has not, by its members.
    """
    fn, params = jp.torch.function(module, example)
    groups = jp.axis_groups(fn, params, jp.torch.as_arrays(example))
    ours = [axes_of_group(group) for group in groups if group.default]
    theirs = {*torch_pruning_axes(module, example)}
    other = [axes for axes in ours if axes not in theirs]
    return {
        "removable": len(ours),
        "same": len(ours) - len(other),
        "other": " ".join(f"{name}:{axis}" for name, axis in sorted(other[0]))
        if other
        else "",
    }


def axes_of_group(group: Any) -> Axes:
    """The axes of parameters that one of our groups has.

    Args:
      group: a group of `jp.axis_groups`.

    Returns:
      Pairs of a parameter's name and an axis.
    """
    return frozenset((member.leaf, member.axis) for member in group.members)


def torch_pruning_axes(module: Any, example: Any) -> Iterator[Axes]:
    """The axes of each group of Torch-Pruning's dependency graph.

    Args:
      module: the module.
      example: what it is called with.

    Yields:
      Pairs of a parameter's name and an axis.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(
        module,
        example,
        forward_fn=call_module if isinstance(example, dict) else None,
        output_transform=sum_of_tensors,
    )
    # Tied parameters have their first name, as ours have.
    names = {id(p): name for name, p in module.named_parameters()}
    # Parameters that no layer has, a class token say.
    loose = {id(entry[0]): entry[1] for entry in graph.unwrapped_parameters}
    kinds = [torch.nn.modules.conv._ConvNd, torch.nn.Linear]
    for group in graph.get_all_groups(root_module_types=kinds):
        axes: set[tuple[str, int]] = set()
        for dependency, _ in group:
            part = dependency.target.module
            is_output = graph.is_out_channel_pruning_fn(dependency.handler)
            if isinstance(part, torch.nn.Parameter):
                axes.add((names[id(part)], loose.get(id(part), 0) % part.ndim))
            else:
                axes |= axes_of_layer(part, is_output, names)
        yield frozenset(axes)


def axes_of_layer(part: Any, is_output: bool, names: dict[int, str]) -> Axes:
    """The axes of a layer's parameters that channels of its output or input are.

    Args:
      part: layer of torch.
      is_output: whether the channels are those of its output.
      names: names of parameters by their identity.

    Returns:
      Pairs of a parameter's name and an axis.
    """
    parameters = dict(part.named_parameters(recurse=False))
    has_matrix = any(parameter.ndim > 1 for parameter in parameters.values())
    # An embedding, and a transposed convolution, have outputs last or second.
    swapped = isinstance(part, torch.nn.Embedding) or getattr(part, "transposed", False)
    axes = set()
    for key, parameter in parameters.items():
        is_matrix = parameter.ndim > 1 and key == "weight"
        if is_matrix and getattr(part, "groups", 1) == 1:
            axes.add((names[id(parameter)], int(is_output == swapped)))
        # What comes into a norm or a depthwise convolution goes out of it.
        elif is_output or is_matrix or not has_matrix:
            axes.add((names[id(parameter)], 0))
    return frozenset(axes)


if __name__ == "__main__":
    main(tyro.cli(Config))
