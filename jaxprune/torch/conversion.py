"""Torch tensors as JAX arrays and back, with their dtypes.

A tree of torch tensors is a tensor, or a tuple, list or dictionary of trees; the same
tree of arrays is what `jax.tree` sees. Values that are no tensors stay apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxprune.torch.environment import torch

# Torch dtypes that NumPy has not, to NumPy's integer of the width and the JAX dtype.
_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
}
_WIDE = {torch.float64, torch.complex128}


def as_arrays(tree: Any) -> Any:
    """Torch tensors as JAX arrays, in the containers that they are in.

    Args:
      tree: tensor, array, or tuple, list or dictionary of such; in a dictionary what
        holds no tensor, such as `use_cache=False`, is left out.

    Returns:
      The same containers with arrays: a batch for `jp.trace`, `jp.prune_trained` and
      the function of `jp.torch.function`. 64-bit integers have 32 bits unless JAX is
      set to 64.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> jp.torch.as_arrays({"x": torch.ones(2, dtype=torch.bfloat16), "flag": True})
      {'x': Array([1, 1], dtype=bfloat16)}
    """
    if isinstance(tree, torch.Tensor):
        return as_array(tree)
    if isinstance(tree, Mapping):
        items = {name: as_arrays(value) for name, value in tree.items()}
        return {name: value for name, value in items.items() if _holds_arrays(value)}
    # Containers stay, so that positions and names are those of the call.
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(as_arrays, tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map(as_arrays, tree))
    return jnp.asarray(tree) if isinstance(tree, np.ndarray) else tree


def _holds_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def as_array(tensor: Any) -> jax.Array:
    """A torch tensor as a JAX array of its own memory.

    Args:
      tensor: torch tensor on any device.

    Returns:
      The array, of the tensor's dtype where JAX has it.
    """
    return jnp.array(as_numpy(tensor))  # a copy: torch goes on writing into its memory


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as a NumPy array, which may share its memory.

    Args:
      tensor: torch tensor on any device.

    Returns:
      The array, of the same dtype; bfloat16 and float8 by `ml_dtypes`.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype in _BITS:
        # The bits themselves: by way of float32 NaNs would lose their payload.
        integer, dtype = _BITS[tensor.dtype]
        bits: np.ndarray = tensor.contiguous().view(integer).numpy()
        return bits.view(dtype)
    array: np.ndarray = tensor.numpy()
    return array


def as_tensor(array: Any) -> Any:
    """A JAX or NumPy array as a torch tensor of its own memory, on the CPU.

    Args:
      array: array of any dtype that torch has, or a lazy one.

    Returns:
      The tensor, of the same dtype.
    """
    values = np.array(array.read() if hasattr(array, "read") else array)
    for dtype, (integer, array_dtype) in _BITS.items():
        if values.dtype == array_dtype:
            bits = values.view(f"i{values.dtype.itemsize}")
            return torch.from_numpy(bits).to(integer).view(dtype)
    return torch.from_numpy(values)


def is_too_wide(tensor: Any) -> bool:
    """Whether JAX, as it is set, would round a tensor to half its width.

    Args:
      tensor: torch tensor.

    Returns:
      True for floats of 64 bits where JAX is not set to 64.
    """
    return tensor.dtype in _WIDE and not jax.config.read("jax_enable_x64")


def as_result(value: Any) -> Any:
    """What a module returned, as a pytree of what is in its tensors.

    Args:
      value: tensor of torchax, or a container: a Hugging Face ModelOutput is a mapping,
        a dataclass its fields.

    Returns:
      Arrays in dictionaries, lists and tuples. What is neither a tensor nor one of
      these, as a cache of keys and values, is left out of dictionaries and None in
      tuples.
    """
    if isinstance(value, torch.Tensor):
        return value.jax() if hasattr(value, "jax") else as_array(value)
    # transformers' outputs are both a dataclass and a mapping without its Nones.
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        items = {str(name): as_result(entry) for name, entry in value.items()}
        return {name: entry for name, entry in items.items() if entry is not None}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_result, value))
    if isinstance(value, list | tuple):
        return type(value)(map(as_result, value))
    return None
