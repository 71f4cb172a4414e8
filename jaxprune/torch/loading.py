"""Parameters written back into a torch module, in place.

Names are the module's own, a tied parameter under its first name. Everything is checked
before anything is written, so a module is changed whole or not at all.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.torch import conversion
from jaxprune.torch.environment import torch


def load(module: Any, params: Mapping[str, Any]) -> None:
    """Writes parameters into a torch module, where its tensors are.

    The module's tensors stay the same objects, so optimizers that hold them, tied
    weights, devices and dtypes stay too; values are rounded to the module's dtypes.

    Args:
      module: the module, of the structure that `jp.torch.function` was given.
      params: {torch name: array} for every parameter, tied ones once; buffers may be
        among them.

    Raises:
      ValueError: a name is missing or unknown, or a shape differs; all of them are
        named, and nothing is written.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> module = torch.nn.Linear(4, 2)
      >>> fn, params = jp.torch.function(module, torch.ones(3, 4))
      >>> scores = jp.scores.magnitude(params)
      >>> jp.torch.load(module, jp.prune(params, scores, 0.5))
      >>> int((module.weight == 0).sum())
      4
    """
    parameters = dict(module.named_parameters())
    tensors = {**dict(module.named_buffers()), **parameters}
    problems = [
        *(f"{name} is missing" for name in sorted(parameters.keys() - params.keys())),
        *(f"{name} is no parameter" for name in sorted(params.keys() - tensors.keys())),
        *misshapen(params, tensors),
        *_foreign(params),
    ]
    if problems:
        raise ValueError(
            "a module takes parameters of its own names and shapes, but "
            f"{listed(problems)}; give the parameters of "
            "jp.torch.function(module, example), tied ones once"
        )
    # Tied parameters share their memory, so one write serves all their names.
    with torch.no_grad():
        for name, array in params.items():
            tensors[name].copy_(conversion.as_tensor(array))


def _foreign(params: Mapping[str, Any]) -> list[str]:
    """Which arrays have a dtype that torch has not."""
    strange = []
    for name, array in params.items():
        try:
            conversion.as_tensor(np.empty(0, array.dtype))
        except TypeError:
            strange.append(f"{name} is {array.dtype}, which torch has not")
    return strange


def misshapen(arrays: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """Which arrays have another shape than the tensor of their name.

    Args:
      arrays: {name: array}.
      tensors: {name: torch tensor}.

    Returns:
      For each: name, its shape and the shape that it should have.
    """
    shapes = {
        name: (tuple(np.shape(array)), tuple(tensors[name].shape))
        for name, array in arrays.items()
        if name in tensors
    }
    return [
        f"{name} {shape} for {expected}"
        for name, (shape, expected) in shapes.items()
        if shape != expected
    ]
