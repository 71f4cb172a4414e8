"""Leaves by name: where they are, which may be pruned, how many of them are zero.

A leaf's name is its path with "/" between the parts, "blocks/0/mlp/up/kernel". NNX's
wrapping (a trailing `.value`) is not part of it, so a tree and the optimizer's copy of
it have the same names, whatever containers they are made of.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from optax import MaskedNode

from jaxprune.arrays.low_bit import is_int8

T = TypeVar("T")

_UNPRUNABLE = re.compile(
    r"embed|norm|(^|[/_])(wte|wpe|ln(_?\w)?|bn\d*|bias|scale)(/|$)"
    r"|(^|/)((lm_|output_)?head|classifier|logits)(/|$)",
    re.IGNORECASE,
)


def is_excluded(node: Any) -> bool:
    """Whether a node stands for a leaf that was left out (`optax.MaskedNode()`)."""
    return isinstance(node, MaskedNode)


def is_leaf(node: Any) -> bool:
    """Whether a node counts as one leaf: left out, or held as `storage.Int8`."""
    return is_excluded(node) or is_int8(node)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in flattening order; left-out leaves included.

    Args:
      tree: any pytree.

    Returns:
      Path name to leaf; the leaf is `optax.MaskedNode()` where it was left out.

    Example:
      >>> import jaxprune as jp
      >>> jp.tree.named_leaves({"mlp": [1.0, 2.0]})
      {'mlp/0': 1.0, 'mlp/1': 2.0}
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {_name(path): leaf for path, leaf in pairs}


def names(tree: Any) -> list[str]:
    """The names of a tree's leaves, in flattening order.

    Args:
      tree: any pytree.

    Returns:
      One path name a leaf.

    Example:
      >>> import jaxprune as jp
      >>> jp.tree.names({"mlp": {"kernel": 1.0, "bias": 0.0}})
      ['mlp/bias', 'mlp/kernel']
    """
    return list(named_leaves(tree))


def prunable(name: str, leaf: Any) -> bool:
    """Whether a leaf may be pruned unless the caller says otherwise.

    A leaf may when it is floating, has two axes or more, and its name does not speak of
    an embedding, a normalisation, a bias or an output head, the parts that the method's
    authors leave alone too.

    Args:
      name: the leaf's path name.
      leaf: an array or anything with `shape` and `dtype`.

    Returns:
      True when the leaf may be pruned.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.tree.prunable("blocks/0/mlp/up/kernel", jnp.zeros((4, 8)))
      True
      >>> jp.tree.prunable("token_embedding/embedding", jnp.zeros((4, 8)))
      False
    """
    return is_floating(leaf) and leaf.ndim >= 2 and not _UNPRUNABLE.search(name)


def excluding(*globs: str) -> Callable[[str, Any], bool]:
    """The default rule less the leaves whose names match one of these globs.

    Args:
      *globs: shell-style patterns on path names, such as "blocks/0/*".

    Returns:
      A rule for the `prunable` argument of a criterion.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> rule = jp.tree.excluding("blocks/0/*")
      >>> rule("blocks/0/kernel", jnp.zeros((4, 8)))
      False
    """

    def rule(name: str, leaf: Any) -> bool:
        return prunable(name, leaf) and not any(
            fnmatch.fnmatchcase(name, glob) for glob in globs
        )

    return rule


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array (or its abstract stand-in) of floating numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def align(reference: Any, other: Any, what: str) -> list[Any]:
    """The leaves of `other` in the order of `reference`, matched by name and shape.

    Args:
      reference: the parameters.
      other: a tree of the same names, of whatever containers; leaves may be left out
        (`optax.MaskedNode()`).
      what: what `other` is, for the error ("masks").

    Returns:
      A list as long as `reference` has leaves; `optax.MaskedNode()` where left out.

    Raises:
      ValueError: names or shapes differ; the sentence names the leaves.
    """
    wanted, given = named_leaves(reference), named_leaves(other)
    missing, foreign = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    if missing or foreign:
        raise ValueError(
            f"{what} must have the leaves of the parameters, but"
            + (f" lack {_listed(sorted(missing))}" if missing else "")
            + (" and" if missing and foreign else "")
            + (f" have unknown {_listed(sorted(foreign))}" if foreign else "")
            + f"; make the {what} from these parameters"
        )
    wrong = [
        f"{name!r} ({jnp.shape(given[name])} for {jnp.shape(leaf)})"
        for name, leaf in wanted.items()
        if not is_excluded(given[name])
        and not is_excluded(leaf)
        and jnp.shape(given[name]) != jnp.shape(leaf)
    ]
    if wrong:
        raise ValueError(
            f"{what} must have the shapes of the parameters, but differ at "
            f"{', '.join(wrong)}; make the {what} from these parameters"
        )
    return [given[name] for name in wanted]


def by_rule(
    rules: Mapping[str, T], leaf_names: Sequence[str], default: T, what: str
) -> list[T]:
    """What the first matching glob of `rules` says of each leaf.

    Args:
      rules: shell-style pattern on path names to value; the first match counts.
      leaf_names: the names that the rules are for.
      default: the value of a leaf that no rule matches.
      what: what the rules give, for the error ("sparsity").

    Returns:
      One value a name.

    Raises:
      ValueError: a rule matches no leaf at all.
    """
    idle = [g for g in rules if not fnmatch.filter(leaf_names, g)]
    if idle:
        raise ValueError(
            f"every {what} rule must match a leaf that may be pruned, but "
            f"{_listed(idle)} match none of {_listed(list(leaf_names))}; "
            "write globs on path names, as in {'*/mlp/*': ...}"
        )

    def first(name: str) -> T:
        return next(
            (v for glob, v in rules.items() if fnmatch.fnmatchcase(name, glob)), default
        )

    return [first(name) for name in leaf_names]


class Sparsity(NamedTuple):
    """How many weights are zero, counted exactly.

    Attributes:
      zeros: zeros in all leaves, a Python integer.
      size: weights in all leaves, a Python integer.
      by_leaf: path name to (zeros, size) of that leaf.
    """

    zeros: int
    size: int
    by_leaf: dict[str, tuple[int, int]]

    @property
    def total(self) -> float:
        """The share of zeros in all leaves, in [0, 1]; 0 for an empty tree."""
        return self.zeros / self.size if self.size else 0.0

    def __str__(self) -> str:
        """A table: one line a leaf, the total last."""
        rows = [*self.by_leaf.items(), ("total", (self.zeros, self.size))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:<{width}}  {zeros / max(size, 1):7.2%}  of {size:,}"
            for name, (zeros, size) in rows
        )


def sparsity(params: Any) -> Sparsity:
    """The share of zeros in each leaf and in all, exact.

    Masks work too (False counts as zero), which gives the sparsity of the prunable
    leaves alone.

    Args:
      params: a pytree of arrays of any dtype.

    Returns:
      Exact counts as Python integers; `print` it for a table.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.sparsity({"a": jnp.array([0.0, 1.0]), "b": jnp.ones(2)}).total
      0.25
    """
    leaves = {
        name: leaf
        for name, leaf in named_leaves(params).items()
        if hasattr(leaf, "dtype")
    }
    nonzero = jax.device_get({k: _count_nonzero(v) for k, v in leaves.items()})
    by_leaf = {
        name: (int(leaf.size) - int(nonzero[name]), int(leaf.size))
        for name, leaf in leaves.items()
    }
    zeros = sum(z for z, _ in by_leaf.values())
    return Sparsity(zeros, sum(n for _, n in by_leaf.values()), by_leaf)


@jax.jit
def _count_nonzero(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf != 0, dtype=np.uint32)


def _name(path: Sequence[Any]) -> str:
    wrapped = path and getattr(path[-1], "name", None) == "value"
    return jax.tree_util.keystr(
        tuple(path[:-1] if wrapped else path), simple=True, separator="/"
    )


def _listed(items: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(repr(item) for item in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
