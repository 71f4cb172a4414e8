"""The smaller function as a module of its class again: Flax NNX, Linen or Equinox.

The arrays are the result's. A class also keeps sizes as attributes. Those of a layer
follow from the shapes of its weights: `SIZES` is the table. What counts heads or
neurons in a class of somebody's own has any name: attributes are tried whose value is
a size that changed, and the forward pass decides which module is the right one.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxprune.arrays import tree
from jaxprune.arrays.messages import first_line
from jaxprune.arrays.rules import Rule, check, error
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.output_difference import relative_difference

Attributes = Mapping[tuple[str, str], Any]
"""(path of a part of the module, name of its attribute) to a value."""

# Attribute to the leaves that say it, and the axes whose product it is.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "in_features": {"kernel": (-2,), "weight": (-1,), "query/kernel": (0,)},
    "out_features": {"kernel": (-1,), "weight": (0,), "out/kernel": (-1,)},
    "features": {"kernel": (-1,), "embedding": (1,)},
    "in_channels": {"weight": (1,)},
    "out_channels": {"weight": (0,)},
    "channels": {"weight": (0,)},
    "num_features": {"scale": (0,), "bias": (0,), "mean": (0,)},
    "num_embeddings": {"embedding": (0,), "weight": (0,)},
    "embedding_size": {"weight": (1,)},
    # Attention of Flax: (inputs, heads, size of a head).
    "num_heads": {"query/kernel": (1,)},
    "num_kv_heads": {"key/kernel": (1,)},
    "in_kv_features": {"key/kernel": (0,)},
    "head_dim": {"query/kernel": (2,)},
    "qkv_features": {"query/kernel": (1, 2)},
}
# Attributes that are the whole shape of a leaf.
_SHAPES = {"kernel_shape": "kernel", "shape": "weight"}
_INPUTS = {"in_features", "in_channels"}
_CONVOLVED = ("feature_group_count", "groups")
_GROUPS = (*_CONVOLVED, "num_groups")  # of channels, of which whole ones go
# Names that say that an attribute is a size; they are set where others are only tried.
_SIZE_WORDS = re.compile(
    "head|width|hidden|channel|feature|size|dim|units|ffn|mlp|expert"
)
_MOST_TRIED = 6  # attributes, whose subsets are tried
_TOLERANCE = 1e-5  # of the largest output; sums of other lengths round apart


def smaller_module(
    model: Any,
    result: Any,
    batch: Any,
    call: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """A module of the same classes with the sizes of a shrunk function.

    Args:
      model: the module before it was shrunk; it stays as it is.
      result: result of `jp.shrink`.
      batch: one batch, to compare the two with.
      call: function of a module and a batch; the module called with it if left out.

    Returns:
      The smaller module.

    Raises:
      TypeError: the model is no module of NNX, Linen or Equinox.
      ValueError: no module of its classes computes what `result.fn` computes.
    """
    frame = _framework(model)
    cuts, arrays = result.fn.cuts, tree.named_leaves(result.params)
    if frame.prefix:  # Linen's trees name the collection first, or leave it out
        cuts = {name.removeprefix(frame.prefix): cut for name, cut in cuts.items()}
    parts = dict(frame.parts(model))
    changed = {name: cut for name, cut in cuts.items() if cut.before != cut.after}
    layers = _layer_sizes(parts, changed)
    tried = _tried_sizes(parts, changed, result.report["groups"], layers)
    reference = result.fn(result.params, batch)
    reason = ""
    for chosen in _choices(tried):
        try:
            small = frame.built(model, arrays, {**layers, **chosen})
            call_it = call or (lambda module, x: module(x))
            output = call_it(frame.callable(small, result.params), batch)
        except Exception as failure:  # whatever a class raises for a wrong size
            reason = reason or first_line(failure)
            continue
        difference = relative_difference(output, reference)
        if difference <= _TOLERANCE:
            # Anew, as a call moves running averages and counts of random numbers.
            return frame.built(model, arrays, {**layers, **chosen})
        reason = reason or f"its outputs differ by {difference:.1e}"
    raise error(_BUILT, model=type(model).__name__, reason=reason)


def _layer_sizes(
    parts: Mapping[str, Any], cuts: Mapping[str, LeafCut]
) -> dict[tuple[str, str], Any]:
    """The attributes of layers that follow from the shapes of their weights."""
    sizes: dict[tuple[str, str], Any] = {}
    for path, part in parts.items():
        inside = {
            name.removeprefix(f"{path}/" if path else ""): cut
            for name, cut in cuts.items()
            if not path or name.startswith(f"{path}/")
        }
        for attribute, leaves in SIZES.items():
            for leaf, axes in leaves.items():
                # Equinox has "scalar" for a size, which stays.
                if leaf in inside and not isinstance(getattr(part, attribute, ""), str):
                    value = _size(part, attribute, inside[leaf], axes)
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


def _size(part: Any, attribute: str, cut: LeafCut, axes: tuple[int, ...]) -> Any:
    """The value of an attribute once a leaf of its layer is cut."""
    before = getattr(part, attribute)
    if isinstance(before, tuple):  # (heads, size of a head), as LinearGeneral has it
        count = len(before)
        return cut.after[:count] if attribute in _INPUTS else cut.after[-count:]
    size = math.prod(cut.after[axis] for axis in axes)
    if attribute in _INPUTS:  # a kernel has the inputs of one group
        for name in _CONVOLVED:
            groups = getattr(part, name, 1)
            size *= _groups(groups, cut, name) if groups > 1 else 1
    return size


def _groups(groups: int, cut: LeafCut, attribute: str) -> int:
    """How many groups of channels are left, where whole groups go."""
    outputs = -1 if attribute == "feature_group_count" else 0  # Flax's axis, Equinox's
    return groups * cut.after[outputs] // cut.before[outputs]


def _tried_sizes(
    parts: Mapping[str, Any],
    cuts: Mapping[str, LeafCut],
    groups: Mapping[str, Mapping[str, int]],
    layers: Attributes,
) -> dict[tuple[str, str], Any]:
    """Attributes that hold a size that changed below them, and what it became."""
    tried: dict[tuple[str, str], Any] = {}
    for path, part in parts.items():
        prefix = f"{path}/" if path else ""
        changes = {
            units["before"]: units["after"]
            for name, units in groups.items()
            if name.removeprefix("params/").startswith(prefix)
        }
        for name, cut in cuts.items():
            if name.startswith(prefix):
                for before, after in zip(cut.before, cut.after, strict=True):
                    if before != after:
                        changes.setdefault(before, after)
        for attribute, value in _attributes(part):
            after = _replaced(value, changes)
            if after != value and (path, attribute) not in layers:
                tried[path, attribute] = after
    return tried


def _attributes(part: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a part that are integers, or tuples of them."""
    for name, value in list(vars(part).items()):
        entries = value if isinstance(value, tuple) else (value,)
        if entries and all(type(entry) is int for entry in entries):
            yield name, value


def _replaced(value: Any, changes: Mapping[int, int]) -> Any:
    if isinstance(value, tuple):
        return tuple(changes.get(entry, entry) for entry in value)
    return changes.get(value, value)


def _choices(tried: Attributes) -> Iterator[dict[tuple[str, str], Any]]:
    """Sets of attributes to set, the likeliest first."""
    likely = {key: tried[key] for key in tried if _SIZE_WORDS.search(key[1])}
    yield likely
    # An attribute of that value may count something else, as layers do.
    names = sorted({name for _, name in tried})[:_MOST_TRIED]
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            subset = {key: value for key, value in tried.items() if key[1] in chosen}
            if subset != likely:
                yield subset


@dataclasses.dataclass(frozen=True)
class _Framework:
    """How modules of a library are taken apart and put together.

    Attributes:
      parts: function of a module to (path, part) of all modules in it, itself first.
      built: function of a module, arrays by leaf name, and attributes to a new module.
      callable: function of a module and parameters to the module that has them.
      prefix: beginning of the names of leaves that the parts' paths lack.
    """

    parts: Callable[[Any], Iterator[tuple[str, Any]]]
    built: Callable[[Any, Mapping[str, Any], Attributes], Any]
    callable: Callable[[Any, Any], Any] = lambda module, params: module
    prefix: str = ""


def _framework(model: Any) -> _Framework:
    """The library of a model, by the Python modules of its base classes."""
    bases = [base.__module__ for base in type(model).__mro__]
    names = [name for name in _FRAMEWORKS if any(b.startswith(name) for b in bases)]
    check(_KNOWN, names=names, model=type(model).__name__)
    return _FRAMEWORKS[names[0]]


def _nnx_parts(model: Any) -> Iterator[tuple[str, Any]]:
    from flax import nnx

    for path, part in nnx.iter_modules(model):
        yield "/".join(map(str, path)), part


def _nnx_built(model: Any, arrays: Mapping[str, Any], attributes: Attributes) -> Any:
    from flax import nnx

    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, _with_arrays(state, arrays))
    parts = dict(_nnx_parts(small))
    for (path, name), value in attributes.items():
        setattr(parts[path], name, value)
    return small


def _with_arrays(module: Any, arrays: Mapping[str, Any]) -> Any:
    """A tree with arrays in the place of the leaves of their names."""
    leaves = tree.named_leaves(module)
    structure: Any = jax.tree.structure(module)
    return jax.tree.unflatten(
        structure, [arrays.get(name, leaf) for name, leaf in leaves.items()]
    )


def _equinox_parts(model: Any) -> Iterator[tuple[str, Any]]:
    import equinox as eqx

    def walk(path: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, eqx.Module):
            yield path, node
            children: Any = vars(node).items()
        elif isinstance(node, dict):
            children = node.items()
        elif isinstance(node, list | tuple):
            children = enumerate(node)
        else:
            children = ()
        for name, child in children:
            yield from walk(f"{path}/{name}" if path else str(name), child)

    yield from walk("", model)


def _equinox_built(
    model: Any, arrays: Mapping[str, Any], attributes: Attributes
) -> Any:
    small = _with_arrays(model, arrays)  # new objects all the way down
    parts = dict(_equinox_parts(small))
    for (path, name), value in attributes.items():
        # Static fields are no leaves, so `eqx.tree_at` does not reach them.
        object.__setattr__(parts[path], name, value)
    return small


def _linen_parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that are fields; those made in `setup` or `__call__` follow them."""
    yield "", model
    for path, part in _linen_fields(model):
        for below, inner in _linen_parts(part):
            yield "/".join(filter(None, [path, below])), inner


def _linen_fields(model: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(model):
        value = getattr(model, field.name, None)
        if _is_linen(value) and field.name != "parent":
            yield field.name, value
        elif isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                if _is_linen(entry):
                    yield f"{field.name}_{i}", entry


def _is_linen(value: Any) -> bool:
    import flax.linen as nn

    return isinstance(value, nn.Module)


def _linen_built(model: Any, arrays: Mapping[str, Any], attributes: Attributes) -> Any:
    def built(part: Any, path: str) -> Any:
        changes = {name: value for (p, name), value in attributes.items() if p == path}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name, None)
            below = f"{path}/{field.name}" if path else field.name
            if _is_linen(value) and field.name != "parent":
                changes[field.name] = built(value, below)
            elif isinstance(value, list | tuple) and any(map(_is_linen, value)):
                changes[field.name] = type(value)(
                    built(entry, f"{below}_{i}") if _is_linen(entry) else entry
                    for i, entry in enumerate(value)
                )
        return part.clone(**changes) if changes else part

    return built(model, "")


def _linen_callable(module: Any, params: Any) -> Any:
    return module.bind(params if "params" in params else {"params": params})


_FRAMEWORKS = {
    "flax.nnx": _Framework(_nnx_parts, _nnx_built),
    "flax.linen": _Framework(_linen_parts, _linen_built, _linen_callable, "params/"),
    "equinox": _Framework(_equinox_parts, _equinox_built),
}

_KNOWN = Rule(
    lambda v: v.names,
    "a module is one of Flax NNX, Flax Linen or Equinox, got {model}",
    "use fn and params of the result",
    error=TypeError,
)
_BUILT = Rule(
    lambda v: False,
    "a smaller module needs its sizes in attributes that can be set, but {model} "
    "cannot have them ({reason})",
    "give call= if it takes more than a batch, make it with the smaller sizes and load "
    "params, or use fn of the result",
)
