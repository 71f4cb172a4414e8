"""One tree of several that each hold some of its leaves."""

from typing import Any

import jax

from jaxprune.arrays import tree


def disjoint(first: Any, second: Any, conflict: str) -> Any:
    """Each leaf from the tree that has it.

    Args:
      first: a tree with `optax.MaskedNode()` for what it lacks; one such node may stand
        for a subtree, as where `optax.partition` labels one.
      second: another tree of the same parameters.
      conflict: sentence of the error.

    Returns:
      A tree like the two; `optax.MaskedNode()` where both lack a leaf.

    Raises:
      ValueError: both have a leaf.
    """
    if tree.is_excluded(first) or tree.is_excluded(second):
        return second if tree.is_excluded(first) else first
    if tree.is_leaf(first) or jax.tree_util.all_leaves([first]):
        raise ValueError(conflict)
    children, structure = _children(first)  # both may have `None`, and empty containers
    pairs = zip(children, _children(second)[0], strict=True)
    return jax.tree.unflatten(structure, [disjoint(*pair, conflict) for pair in pairs])


def _children(node: Any) -> tuple[list[Any], Any]:
    """What a node holds, one level down, and how to put it back."""
    return jax.tree.flatten(node, is_leaf=lambda below: below is not node)
