"""How a torch module is called: its arguments, its mode, and which of its parts run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.torch import conversion
from jaxprune.torch.environment import torch


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a module.

    Args:
      batch: a tensor, a tuple or list of arguments, or a dictionary of them.

    Returns:
      The tuple and the dictionary.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, list | tuple) else ((batch,), {})


def settings(example: Any) -> dict[str, Any]:
    """The arguments of an example that are no tensors.

    Args:
      example: what a module is called with.

    Returns:
      {argument: value}, of a dictionary.

    Raises:
      TypeError: there are some by position, or inside of an entry with tensors.
    """
    if isinstance(example, Mapping):
        arrays = conversion.as_arrays(example)
        others = {name: value for name, value in example.items() if name not in arrays}
        mixed = [
            *(name for name in arrays if _strange(example[name])),
            *(name for name, value in others.items() if _has_arrays(value)),
        ]
        if mixed:
            raise TypeError(
                "an entry of an example must hold tensors alone, or none, but "
                f"{listed(mixed)} has both; give what is no tensor as an entry of its "
                "own, or bind it in the module"
            )
        return others
    strange = listed(map(repr, _strange(example)))
    if strange:
        raise TypeError(
            f"an example by position must hold tensors alone, got {strange}; give the "
            "arguments by name, in a dictionary"
        )
    return {}


def _strange(tree: Any) -> list[Any]:
    """The leaves that are no tensors."""
    return [leaf for leaf in _leaves(tree) if not isinstance(leaf, _ARRAYS)]


def _has_arrays(tree: Any) -> bool:
    return any(isinstance(leaf, _ARRAYS) for leaf in _leaves(tree))


def _leaves(tree: Any) -> Iterator[Any]:
    """The leaves of what `as_arrays` converts, any mapping included."""
    if isinstance(tree, Mapping):
        tree = [*tree.values()]
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _leaves(part)
    elif tree is not None:
        yield tree


_ARRAYS = (torch.Tensor, jax.Array, np.ndarray)


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """The module in eval mode, and afterwards each part in the mode that it was in."""
    # Part by part: a frozen batch norm may be in eval mode inside a training module.
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def attributes_kept(module: Any) -> Iterator[None]:
    """A module whose parts have the attributes that they had, afterwards.

    Some write what they compute into themselves, as old weight norms and
    `torch.nn.utils.prune` do: JAX's tracers would stay there.

    Args:
      module: torch module.

    Yields:
      Nothing.
    """
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextlib.contextmanager
def running_parts(module: Any) -> Iterator[list[str]]:
    """Notes which parts of a module run: for errors, since the hooks cost time.

    Args:
      module: torch module.

    Yields:
      Names of the parts that run, the innermost last; after a failure those of the
      parts that did not end. The module itself has the name "".
    """
    running: list[str] = []

    def leave(*_: Any) -> None:  # what it returned would be taken for the output
        running.pop()

    handles = []
    for name, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
            part.register_forward_hook(leave),  # not reached by the ones that fail
        ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
