"""The sizes that a module keeps as attributes, once the leaves below it are cut.

Those of a layer follow from the shapes of its weights: `SIZES` is the table. What
counts heads or neurons in a class of somebody's own has any name: attributes are tried
whose value is a size that changed.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.structured.cut import LeafCut

Key = tuple[str, str]
"""Path of a part of the module, and name of its attribute."""
Attributes = Mapping[Key, Any]

# Attribute to the leaves that say it, and the axes whose product it is; from the end,
# since layers may be stacked in front.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "in_features": {"kernel": (-2,), "weight": (-1,), "query/kernel": (-3,)},
    "out_features": {"kernel": (-1,), "weight": (-2,), "out/kernel": (-1,)},
    "features": {"kernel": (-1,), "embedding": (-1,)},
    "in_channels": {"weight": (1,)},
    "out_channels": {"weight": (0,)},
    "channels": {"weight": (0,)},
    "num_features": {"scale": (-1,), "bias": (-1,), "mean": (-1,)},
    "num_embeddings": {"embedding": (-2,), "weight": (-2,)},
    "embedding_size": {"weight": (-1,)},
    # Attention of Flax: (inputs, heads, size of a head).
    "num_heads": {"query/kernel": (-2,)},
    "num_kv_heads": {"key/kernel": (-2,)},
    "in_kv_features": {"key/kernel": (-3,)},
    "head_dim": {"query/kernel": (-1,)},
    "qkv_features": {"query/kernel": (-2, -1)},
    # Attention and MLP of Equinox.
    "query_size": {"query_proj/weight": (-1,)},
    "key_size": {"key_proj/weight": (-1,)},
    "value_size": {"value_proj/weight": (-1,)},
    "output_size": {"output_proj/weight": (-2,)},
    "in_size": {"layers/0/weight": (-1,)},
    "width_size": {"layers/0/weight": (-2,)},
}
# Attributes that are the whole shape of a leaf.
_SHAPES = {"kernel_shape": "kernel", "shape": "weight"}
_INPUTS = {"in_features", "in_channels"}
_CONVOLVED = ("feature_group_count", "groups")
_GROUPS = (*_CONVOLVED, "num_groups")  # of channels
# Names that say that an attribute is a size; they are set where others are only tried.
_SIZE_WORDS = re.compile(
    "head|width|hidden|channel|feature|size|dim|units|ffn|mlp|expert"
)
_MOST_TRIED = 6  # attributes, whose values are tried together
_MOST_VALUES = 3  # of one attribute
_MOST_CHOICES = 64


class Tried(NamedTuple):
    """What an attribute may have become.

    Attributes:
      values: the sizes, or tuples of sizes, the first the likeliest.
      certain: whether nothing below the module still has the size that it holds.
    """

    values: tuple[Any, ...]
    certain: bool


def layer_sizes(
    parts: Mapping[str, Any], cuts: Mapping[str, LeafCut]
) -> dict[Key, Any]:
    """The attributes of layers that follow from the shapes of their weights.

    Args:
      parts: path to module, of all modules.
      cuts: name of each leaf to its cut.

    Returns:
      The new value of each attribute that holds what the table says it would.
    """
    sizes: dict[Key, Any] = {}
    for path, part in parts.items():
        inside = {
            name: cut
            for name, cut in _below(path, cuts).items()
            if cut.before != cut.after
        }
        for attribute, leaves in SIZES.items():
            held = getattr(part, attribute, "")
            # Equinox has "scalar" for a size, which stays.
            if held is not None and not isinstance(held, int | tuple):
                continue
            for leaf, axes in leaves.items():
                # A class of one's own may mean something else by that name.
                cut = inside.get(leaf)
                if cut is None or not _has_axes(cut, axes):
                    continue
                if held in (None, _size(part, attribute, cut, axes, now=False)):
                    value = _size(part, attribute, cut, axes, now=True)
                    sizes.setdefault((path, attribute), value)
        for attribute, leaf in _SHAPES.items():
            if leaf in inside and isinstance(getattr(part, attribute, None), tuple):
                sizes[path, attribute] = inside[leaf].after
        for attribute in _GROUPS:
            groups = getattr(part, attribute, 1)
            by_channel = ("kernel", "weight", "scale", "bias")
            leaf_cut = next((inside[x] for x in by_channel if x in inside), None)
            if isinstance(groups, int) and groups > 1 and leaf_cut is not None:
                sizes[path, attribute] = _groups(groups, leaf_cut, attribute)
    return sizes


def _has_axes(cut: LeafCut, axes: tuple[int, ...]) -> bool:
    rank = len(cut.before)
    return all(-rank <= axis < rank for axis in axes)


def _below(path: str, cuts: Mapping[str, LeafCut]) -> dict[str, LeafCut]:
    """The cuts of the leaves below a module, by their names from there."""
    prefix = f"{path}/" if path else ""
    return {
        name.removeprefix(prefix): cut
        for name, cut in cuts.items()
        if name.startswith(prefix)
    }


def _size(
    part: Any, attribute: str, cut: LeafCut, axes: tuple[int, ...], *, now: bool
) -> Any:
    """What an attribute is by a leaf of its layer, before the leaf is cut or now."""
    held, shape = getattr(part, attribute), cut.after if now else cut.before
    if isinstance(held, tuple):  # (heads, size of a head), as LinearGeneral has it
        count = len(held)
        return shape[:count] if attribute in _INPUTS else shape[-count:]
    size = math.prod(shape[axis] for axis in axes)
    if attribute in _INPUTS:  # a kernel has the inputs of one group
        for name in _CONVOLVED:
            groups = getattr(part, name, 1)
            if groups > 1:
                size *= _groups(groups, cut, name) if now else groups
    return size


def _groups(groups: int, cut: LeafCut, attribute: str) -> int:
    """How many groups of channels are left, of which any output is."""
    axis = 0 if attribute == "groups" else len(cut.before) - 1  # Equinox's, Flax's
    positions = cut.kept[0][axis]
    if positions is None:
        return groups
    return len(np.unique(positions // (cut.before[axis] // groups)))


def tried_sizes(
    parts: Mapping[str, Any],
    cuts: Mapping[str, LeafCut],
    groups: Mapping[str, Mapping[str, int]],
    layers: Attributes,
) -> dict[Key, Tried]:
    """Attributes that hold a size that changed below them, and what it may be now.

    Args:
      parts: path to module, of all modules.
      cuts: name of each leaf to its cut.
      groups: "before" and "after" of each group of units.
      layers: attributes that are known.

    Returns:
      The other attributes that are such a size.
    """
    tried: dict[Key, Tried] = {}
    for path, part in parts.items():
        prefix = f"{path}/" if path else ""
        pairs = [
            (units["before"], units["after"])
            for name, units in groups.items()
            if name.removeprefix("params/").startswith(prefix)
        ]
        for cut in _below(path, cuts).values():
            pairs += zip(cut.before, cut.after, strict=True)
        changes: dict[int, list[int]] = {}
        for before, after in pairs:
            values = changes.setdefault(before, [])
            if before != after and after not in values:
                values.append(after)
        same = {before for before, after in pairs if before == after}
        for attribute, held in _attributes(part):
            options = _options(held, changes)
            if options and (path, attribute) not in layers:
                entries = held if isinstance(held, tuple) else (held,)
                certain = len(options) == 1 and same.isdisjoint(entries)
                tried[path, attribute] = Tried(options, certain)
    return tried


def _attributes(part: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a part that are integers, or tuples of them."""
    for name, value in list(vars(part).items()):
        entries = value if isinstance(value, tuple) else (value,)
        if entries and all(type(entry) is int for entry in entries):
            yield name, value


def _options(held: Any, changes: Mapping[int, Sequence[int]]) -> tuple[Any, ...]:
    """What a size, or a tuple of sizes, may be now; nothing where it did not change."""
    if not isinstance(held, tuple):
        return tuple(changes.get(held, ()))
    values = [changes.get(entry) or [entry] for entry in held]
    changed = any(changes.get(entry) for entry in held)
    count = max(map(len, values)) if changed else 0
    return tuple(
        tuple(sizes[min(i, len(sizes) - 1)] for sizes in values) for i in range(count)
    )


def choices(tried: Mapping[Key, Tried]) -> Iterator[dict[Key, Any]]:
    """Sets of attributes to set, the likeliest first.

    Args:
      tried: what attributes may have become.

    Yields:
      Values by attribute; the other attributes stay as they are.
    """
    likely = {
        key: values[0]
        for key, (values, certain) in tried.items()
        if certain and _SIZE_WORDS.search(key[1])
    }
    yield likely
    others = {key: attribute for key, attribute in tried.items() if key not in likely}
    for subset in _subsets(others):
        yield {**likely, **subset}
    # An attribute of that value may count something else, as layers do.
    yield from _subsets(tried)


def _subsets(tried: Mapping[Key, Tried]) -> Iterator[dict[Key, Any]]:
    """Values of some attributes, few before many; one name has one kind of value."""
    names = sorted({name for _, name in tried})[:_MOST_TRIED]
    most = max((len(attribute.values) for attribute in tried.values()), default=0)
    numbers = itertools.product(range(min(most, _MOST_VALUES) + 1), repeat=len(names))
    few_first = sorted(numbers, key=lambda chosen: sum(map(bool, chosen)))
    for chosen in few_first[:_MOST_CHOICES]:
        number = dict(zip(names, chosen, strict=True))  # 0 leaves it as it is
        yield {
            key: values[min(number[key[1]], len(values)) - 1]
            for key, (values, _) in tried.items()
            if number.get(key[1])
        }
