"""The masks of an optimizer's state, found and replaced wherever they are.

A state that holds masks is a NamedTuple with the fields `masks` and `inner`, whoever
wrote it. `nnx.state(optimizer)` keeps only the names of fields; they are enough.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from optax import MaskedNode

from jaxprune.arrays import merge, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.masking import packing
from jaxprune.masking.checks import aligned_masks
from jaxprune.masking.combine import combine
from jaxprune.masking.packed_mask import PackedMask, is_packed
from jaxprune.typing import Masks, Params

T = TypeVar("T")

# The fields of the states with masks, all together.
_FIELDS = frozenset({"masks", "inner", "step", "parked", "split", "gradients", "ages"})


def get(state: Any, params: Params | None = None) -> Masks:
    """The masks, found anywhere inside an optimizer's state.

    Args:
      state: the state of any optax optimizer, however wrapped (`chain`, `partition`,
        `MultiSteps`, ...), that `keep_masks`, `gradual` or another transformation with
        masks is part of; an `nnx.Optimizer`, or its `nnx.state`.
      params: the parameters, or their shapes; only needed for packed masks that an
        `nnx.Optimizer` holds, which drops the shapes they have packed.

    Returns:
      Boolean masks like the parameters; packed ones are unpacked. Of masks in masks,
      as of `keep_masks(gradual(...), masks)`, what all of them keep. Leaves without a
      mask are `optax.MaskedNode()`.

    Raises:
      ValueError: the state holds no masks, two transformations side by side mask one
        leaf, or shapes are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> masks = {"w": jnp.array([True, False])}
      >>> tx = optax.chain(jp.keep_masks(optax.adamw(0.1), masks))
      >>> jp.masks.get(tx.init({"w": jnp.ones(2)}))["w"].tolist()
      [True, False]
    """
    trees = [_read_nested(node, params) for node in _holders(state)]
    if not trees:
        raise ValueError(
            "this optimizer state holds no masks; train with jp.keep_masks(optimizer, "
            "masks) or jp.gradual(optimizer, schedule)"
        )
    return _side_by_side(trees)


def replace(state: T, masks: Masks) -> T:
    """The state with other masks, wherever it holds them.

    The next step sets what they prune to zero. They must have a mask for the same
    leaves, so that a compiled step stays compiled.

    Args:
      state: any state in which `masks.get` finds masks.
      masks: boolean masks of the same parameters, in any container.

    Returns:
      A state of the same structure, the masks placed and packed as those before.

    Raises:
      ValueError: the state holds no masks, or masks of other leaves.
      TypeError: the masks are not boolean.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.keep_masks(optax.adamw(0.1), {"w": jnp.array([True, False])})
      >>> state = tx.init({"w": jnp.ones(2)})
      >>> state = jp.masks.replace(state, {"w": jnp.array([False, True])})
      >>> jp.masks.get(state)["w"].tolist()
      [False, True]
    """
    before = get(state, masks)
    names = tree.names(before)
    replacements = dict(zip(names, aligned_masks(before, masks), strict=True))
    if wrong := [
        name
        for name, mask in tree.named_leaves(before).items()
        if tree.is_excluded(mask) != tree.is_excluded(replacements[name])
    ]:
        raise ValueError(
            "masks.replace needs masks of the leaves that the state has masks of, but "
            f"{listed(wrong)} differ; give jnp.ones(shape, bool) where all is kept"
        )

    def replaced(node: Any) -> Any:
        if not _holds(node):
            return node
        new_leaves = [
            # A copy, as a step may be given its state to donate.
            mask
            if tree.is_excluded(mask)
            else placement.copied(replacements[name], mask)
            for name, mask in _named(node, masks).items()
        ]
        held = _masks(node)
        # NNX's optimizer holds the bits of a packed mask as a bare uint8.
        packed = any(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(held))
        leaves = jax.tree.leaves(packing.pack(new_leaves) if packed else new_leaves)
        new = jax.tree.unflatten(jax.tree.structure(held), leaves)
        # What the wrapped optimizer masks too would else bring the old masks back.
        inner = jax.tree.map(replaced, _inner(node), is_leaf=_holds)
        if isinstance(node, Mapping):
            fields = {"masks": new} | ({"inner": inner} if "inner" in node else {})
            return type(node)({**node, **fields})  # type: ignore[call-arg]
        return node._replace(masks=new, inner=inner)

    return jax.tree.map(replaced, state, is_leaf=_holds)


def _holds(node: Any) -> bool:
    """Whether a node is a state with masks."""
    if isinstance(node, Mapping):  # a field without arrays may be missing
        named = "masks" in node and _FIELDS.issuperset(node)
        return named and not _holders(node["masks"])  # else it is a `named_chain`
    return {"masks", "inner"} <= set(getattr(node, "_fields", ()))


def _holders(state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=_holds) if _holds(node)]


def _masks(node: Any) -> Any:
    """A node's masks as it holds them."""
    return node["masks"] if isinstance(node, Mapping) else node.masks


def _inner(node: Any) -> Any:
    """The state of the optimizer that a node's transformation wraps."""
    return node.get("inner") if isinstance(node, Mapping) else node.inner


def _side_by_side(trees: Sequence[Masks]) -> Masks:
    """One tree of the masks of transformations that share the leaves out."""
    conflict = (
        "each leaf must have one mask, but two transformations in this state mask the "
        "same leaf; remove all but one"
    )
    return functools.reduce(lambda a, b: merge.disjoint(a, b, conflict), trees)


def _read_nested(node: Any, params: Any) -> Masks:
    """What a node's masks and those of the optimizer that it wraps keep."""
    masks = _read(node, params)
    nested = [_read_nested(below, params) for below in _holders(_inner(node))]
    return combine(masks, _side_by_side(nested)) if nested else masks


def _read(node: Any, params: Any) -> Masks:
    """A node's masks as booleans, like the parameters."""
    named, held = _named(node, params), _masks(node)
    if not any(map(_is_bits, jax.tree.leaves(held, is_leaf=_is_leaf))):
        structure = jax.tree.structure(held, is_leaf=_is_leaf)
        return jax.tree.unflatten(structure, list(named.values()))
    # Bits do not have the structure of the parameters: a packed mask is a node.
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    leaves = [named.get(name, MaskedNode()) for name in tree.names(params)]
    return jax.tree.unflatten(structure, leaves)


def _named(node: Any, params: Any) -> dict[str, Any]:
    """A node's masks by name, as booleans, in the order in which it holds them."""
    like = {} if params is None else tree.named_leaves(params)

    def unpacked(name: str, mask: Any) -> Any:
        if is_packed(mask):
            return packing.unpack(mask)
        if not _is_bits(mask):
            return mask
        if not hasattr(like.get(name), "shape"):
            raise ValueError(
                "packed masks of an nnx.Optimizer have no shapes, so those of the "
                f"parameters are needed, but {name!r} has none; call "
                "jp.masks.get(optimizer, params)"
            )
        return packing.unpack(PackedMask(mask, like[name].shape))

    held = tree.named_leaves(_masks(node), is_leaf=_is_leaf)
    names = [packing.leaf_name(n) if _is_bits(m) else n for n, m in held.items()]
    return {n: unpacked(n, m) for n, m in zip(names, held.values(), strict=True)}


def _is_leaf(node: Any) -> bool:
    return tree.is_excluded(node) or is_packed(node)


def _is_bits(leaf: Any) -> bool:
    """Whether it is what NNX's optimizer makes of a packed mask."""
    return not _is_leaf(leaf) and leaf.dtype == np.uint8
