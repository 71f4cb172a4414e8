"""A torch module with smaller tensors in the place of its own.

The module keeps its classes: tensors are replaced wherever they are used, tied ones by
one, and the attributes that hold sizes are set.
"""

import operator
from collections.abc import Mapping
from typing import Any

from jaxprune.arrays.messages import listed
from jaxprune.torch import conversion
from jaxprune.torch.environment import torch
from jaxprune.torch.layer_sizes import Attributes


def resize(module: Any, state_dict: Mapping[str, Any], attributes: Attributes) -> None:
    """Makes a fresh module as small as a saved one, in place, and loads it.

    Args:
      module: the module at its original sizes, made as the one that was shrunk.
      state_dict: state dictionary of the smaller module.
      attributes: {module name: {attribute: value}}, the entry "attributes" of the
        report of `jp.torch.shrink`.

    Raises:
      ValueError: a name is missing or unknown, or an attribute is none of a module;
        nothing is changed then.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> def make():
      ...     return torch.nn.Sequential(
      ...         torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> small, report = jp.torch.shrink(
      ...     make(), torch.ones(3, 4), jp.scores.magnitude, 0.5)
      >>> fresh = make()
      >>> jp.torch.resize(fresh, small.state_dict(), report["attributes"])
      >>> fresh[0]
      Linear(in_features=4, out_features=4, bias=True)
    """
    tensors = _state_tensors(module)
    parts = dict(module.named_modules(remove_duplicate=False))
    strange = [
        f"{name}.{attribute}"
        for name, values in attributes.items()
        for attribute in values
        if not _has_attribute(parts.get(name), attribute)
    ]
    if wrong := [
        *(f"{name} is missing" for name in sorted(tensors.keys() - state_dict.keys())),
        *(f"{name} is unknown" for name in sorted(state_dict.keys() - tensors.keys())),
    ]:
        raise ValueError(
            "a state dictionary must have the names of the module, but "
            f"{listed(wrong)}; make the module as the one that was shrunk was made"
        )
    if strange:
        raise ValueError(
            f"attributes are those of the module's parts, but it has no {strange}; "
            'give the entry "attributes" of the report'
        )
    # Buffers outside the state dictionary have no units: tables of positions. Empty
    # tensors, since those of the dictionary would be shared with the saved module.
    changed = {
        name: torch.empty_like(state_dict[name])
        for name, tensor in tensors.items()
        if tensor.shape != state_dict[name].shape
    }
    replace_tensors(module, changed)
    set_attributes(module, attributes)
    module.load_state_dict(state_dict)


def _has_attribute(part: Any, attribute: str) -> bool:
    try:
        operator.attrgetter(attribute)(part)
    except AttributeError:
        return False
    return True


def _state_tensors(module: Any) -> dict[str, Any]:
    """What a state dictionary holds: parameters and the buffers that are saved."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def replace_tensors(module: Any, tensors: Mapping[str, Any]) -> None:
    """Puts tensors of other shapes in the place of a module's own.

    Args:
      module: the module; changed in place.
      tensors: {name of a parameter or buffer: torch tensor}; what is tied to it
        changes with it.
    """
    originals = {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    # By identity, since a tied parameter stands under several names.
    successors: dict[int, Any] = {}
    for name, tensor in tensors.items():
        original = originals[name]
        # The device and dtype of the one before, and whether it trains.
        tensor = tensor.detach().to(original.device, original.dtype)
        if isinstance(original, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, original.requires_grad)
        successors.setdefault(id(original), tensor)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if id(tensor) in successors:
                    table[name] = successors[id(tensor)]
        if isinstance(part, torch.nn.RNNBase):
            part._init_flat_weights()  # a second list of the same parameters


def set_attributes(module: Any, attributes: Attributes) -> None:
    """Sets the attributes that hold sizes.

    Args:
      module: the module; changed in place.
      attributes: {module name: {attribute: value}}; lists become what they were.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    for name, values in attributes.items():
        for attribute, value in values.items():
            path, _, field = attribute.rpartition(".")
            # "config.num_attention_heads" is a field of an attribute.
            owner = getattr(parts[name], path) if path else parts[name]
            before = getattr(owner, field)
            # JSON has no tuples, and torch compares shapes with them.
            after = tuple(value) if isinstance(before, tuple) else value
            setattr(owner, field, after)


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by name as torch tensors by name.

    Args:
      arrays: {name: array}.

    Returns:
      {name: tensor on the CPU}.
    """
    return {name: conversion.as_tensor(array) for name, array in arrays.items()}
