"""Leaves by name: how a leaf is called, and trees aligned.

A leaf's name is its path with "/" between the parts, "blocks/0/mlp/up/kernel". What
wraps an array is not part of it: the `value` of NNX's variables and of Linen's boxes,
the "0" that JAX makes up for the one array of a Haliax NamedArray, the value of a
Penzai variable, whose label is its name.
So a tree and the optimizer's copy of it have the same names, whatever containers they
are made of. Keras has names only where they are asked for: {v.path: v.value}.
"""

import fnmatch
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from optax import MaskedNode

from jaxprune.arrays.low_bit import is_int8
from jaxprune.arrays.messages import listed

T = TypeVar("T")


def is_excluded(node: Any) -> bool:
    """Whether a node stands for a leaf that was left out (`optax.MaskedNode()`)."""
    return isinstance(node, MaskedNode)


def is_leaf(node: Any) -> bool:
    """Whether a node counts as one leaf: left out, or held as `low_bit.Int8`."""
    return is_excluded(node) or is_int8(node)


def is_placeholder(params: Any) -> bool:
    """Whether this is what `optax.tree.map_params` gives `init` for the parameters."""
    # It stands for a whole tree; where it comes out in a state, a tree like the
    # parameters lies.
    return type(params).__name__ == "_ParamsPlaceholder"


def named_leaves(
    tree: Any, *, is_leaf: Callable[[Any], bool] = is_leaf
) -> dict[str, Any]:
    """The leaves of a tree by name, in flattening order; left-out leaves included.

    Args:
      tree: any pytree.
      is_leaf: whether a node counts as one leaf.

    Returns:
      Path name to leaf; the leaf is `optax.MaskedNode()` where it was left out.

    Raises:
      ValueError: two leaves have one name, as in {"a/b": x, "a": {"b": y}}.

    Example:
      >>> import jaxprune as jp
      >>> jp.tree.named_leaves({"mlp": [1.0, 2.0]})
      {'mlp/0': 1.0, 'mlp/1': 2.0}
    """
    named: dict[str, Any] = {}
    for name, leaf in pairs(tree, is_leaf):
        if name in named:
            raise ValueError(
                f"every leaf must have a name of its own, but two are called {name!r}; "
                "rename one"
            )
        named[name] = leaf
    return named


def pairs(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Name and leaf, in flattening order, for nodes that count as leaves."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in _paths(tree, is_leaf)
    ]


def _paths(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> list[tuple[tuple[Any, ...], Any]]:
    """Path and leaf, without the keys of what wraps a leaf."""
    paths: list[tuple[tuple[Any, ...], Any]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: is_leaf(node) or _is_wrapper(node)
    ):
        if not _is_wrapper(node):
            paths.append((path, node))
            continue
        if _is_class_of(node, *_LABELED):
            # "block_0/mlp.weights" stands where a number or an attribute would.
            label = jax.tree_util.GetAttrKey(node.label.replace(".", "/"))
            for below, leaf in _paths(node.value, is_leaf):
                # Less the key of a NamedArray's one array.
                paths.append(((*path[:-1], label, *below[1:]), leaf))
            continue
        for _, child in _children(node):
            paths += [((*path, *below), x) for below, x in _paths(child, is_leaf)]
    return paths


def _is_wrapper(node: Any) -> bool:
    """Whether a node's own key is no part of the names under it."""
    if isinstance(node, dict | list | tuple | jax.Array | np.ndarray | None):
        return False
    if any(_is_class_of(node, *names) for names in _WRAPPERS):
        return True
    # A class that was registered without keys, and has one child, as Haliax's
    # NamedArray: JAX counts the children, and the count says nothing.
    children = _children(node)
    return len(children) == 1 and isinstance(
        next(iter(children[0][0]), None), jax.tree_util.FlattenedIndexKey
    )


# Of NNX, of Penzai (as `unbind_params(model, freeze=True)` gives it) and of Linen, as
# `nn.with_partitioning` makes it.
_LABELED = "LabeledVariableValue", "penzai.core"
_WRAPPERS = (
    ("Variable", "flax.nnx"),
    ("AxisMetadata", "flax.core.meta"),
    _LABELED,
)


def _is_class_of(node: Any, name: str, module: str) -> bool:
    """Whether a node is of a class of a library, which need not be here for that."""
    return any(
        base.__name__ == name and base.__module__.startswith(module)
        for base in type(node).__mro__
    )


def _children(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Key and child; of a leaf no key and the leaf itself."""
    return jax.tree_util.tree_leaves_with_path(
        node, is_leaf=lambda part: part is not node
    )


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


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array (or its abstract stand-in) of floating numbers.

    Args:
      leaf: anything; what has no dtype is not of floating numbers.

    Returns:
      True for floating dtypes, False for every other leaf.

    Raises:
      TypeError: it is a tensor of torch, whose dtype says nothing to NumPy.
    """
    if is_torch(leaf):
        raise TypeError(
            "leaves must be arrays of JAX or NumPy, but got torch's; take both the "
            "function and its parameters from jp.torch.function(module, batch)"
        )
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_torch(leaf: Any) -> bool:
    """Whether a leaf is a tensor of torch, which is an array to `jp.torch` alone."""
    return _is_class_of(leaf, "Tensor", "torch")


def align(reference: Any, other: Any, what: str) -> list[Any]:
    """The leaves of `other` in the order of `reference`, matched by name and shape.

    Args:
      reference: the parameters.
      other: a tree of the same names, of whatever containers; leaves may be left out
        (`optax.MaskedNode()`).
      what: word for `other` in the error ("masks").

    Returns:
      A list as long as `reference` has leaves; `optax.MaskedNode()` where left out.

    Raises:
      ValueError: names or shapes differ; the sentence names the leaves.
    """
    expected, leaves = named_leaves(reference), named_leaves(other)
    _spread_excluded(leaves, expected)
    missing, foreign = expected.keys() - leaves.keys(), leaves.keys() - expected.keys()
    if missing or foreign:
        phrases = [f"lack {listed(sorted(missing))}"] * bool(missing)
        phrases += [f"have unknown {listed(sorted(foreign))}"] * bool(foreign)
        raise ValueError(
            f"{what} must have the leaves of the parameters, but "
            f"{' and '.join(phrases)}; make the {what} from these parameters"
        )
    misshapen = [
        f"{name!r} ({jnp.shape(leaves[name])} for {jnp.shape(like)})"
        for name, like in expected.items()
        if not (is_excluded(leaves[name]) or is_excluded(like))
        and jnp.shape(leaves[name]) != jnp.shape(like)
    ]
    if misshapen:
        raise ValueError(
            f"{what} must have the shapes of the parameters, but differ at "
            f"{', '.join(misshapen)}; make the {what} from these parameters"
        )
    return [leaves[name] for name in expected]


def _spread_excluded(leaves: dict[str, Any], expected: Mapping[str, Any]) -> None:
    """Leaves out what a left-out node stands for; optax labels whole subtrees so."""
    for name, leaf in list(leaves.items()):
        if is_excluded(leaf) and name not in expected:
            # An empty name is the root's: the whole tree is left out.
            below = [n for n in expected if n.startswith(f"{name}/") or not name]
            leaves |= dict.fromkeys(below, leaf)
            if below:
                del leaves[name]


def with_nodes(masks: Any, names: Container[str]) -> Any:
    """The masks with `MaskedNode()` for True, and for None at one of the names."""

    def counts(node: Any) -> bool:
        return node is None or is_leaf(node)

    leaves = [
        MaskedNode() if mask is True or (mask is None and name in names) else mask
        for name, mask in pairs(masks, counts)
    ]
    return jax.tree.unflatten(jax.tree.structure(masks, is_leaf=counts), leaves)


def fits(name: str, glob: str) -> bool:
    """Whether a glob matches a name, or is this name, which may hold brackets."""
    return name == glob or fnmatch.fnmatchcase(name, glob)


def by_rule(
    rules: Mapping[str, T], leaf_names: Sequence[str], default: T, what: str
) -> list[T]:
    """What the first matching glob of `rules` says of each leaf.

    Args:
      rules: values by shell-style pattern on path names; the first match counts.
      leaf_names: path names that the rules are for.
      default: value of a leaf that no rule matches.
      what: word for the values in the error ("sparsity").

    Returns:
      One value a name.

    Raises:
      ValueError: a rule matches no leaf at all, or those before it all of its.
    """
    matched = {g: {n for n in leaf_names if fits(n, g)} for g in rules}
    unused = [glob for glob, names in matched.items() if not names]
    if unused:
        raise ValueError(
            f"every {what} rule must match a leaf that may be pruned, but "
            f"{listed(unused)} match none of {listed(leaf_names)}; "
            "write globs on path names, as in {'*/mlp/*': ...}"
        )

    taken: dict[str, str] = {}  # name to the first glob that matches it
    for glob, names in matched.items():
        if names <= taken.keys():
            earlier = listed(sorted({taken[name] for name in names}))
            raise ValueError(
                f"the first {what} rule that matches a leaf counts, so {glob!r} behind "
                f"{earlier} would do nothing; put the narrower one first"
            )
        taken = dict.fromkeys(names, glob) | taken

    def first(name: str) -> T:
        return next((v for glob, v in rules.items() if fits(name, glob)), default)

    return [first(name) for name in leaf_names]
