"""The attributes in which torch modules hold sizes, and their values once cut.

A layer's attributes follow from its tensors: `LAYERS` is a table by class. What holds
a count of heads or a width for several layers, as an attention does, has it under one
of a few names: `COUNTS` and `WIDTHS`. They are set where the value is that of the units
that its layers lost, and the forward pass decides whether that was right.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxprune.structured.cut import LeafCut
from jaxprune.torch.environment import torch

V = TypeVar("V")
Attributes = dict[str, dict[str, Any]]
"""Module name to its attributes that change, each with its new value."""

# Class to {attribute: (tensors that show it, of which one is there, axis)}.
LAYERS: dict[Any, dict[str, tuple[Sequence[str], int]]] = {
    torch.nn.Linear: {
        "out_features": (("weight",), 0),
        "in_features": (("weight",), 1),
    },
    torch.nn.Bilinear: {
        "out_features": (("weight",), 0),
        "in1_features": (("weight",), 1),
        "in2_features": (("weight",), 2),
    },
    torch.nn.modules.batchnorm._NormBase: {
        "num_features": (("weight", "running_mean"), 0)
    },
    torch.nn.GroupNorm: {"num_channels": (("weight",), 0)},
    torch.nn.Embedding: {
        "num_embeddings": (("weight",), 0),
        "embedding_dim": (("weight",), 1),
    },
    torch.nn.PReLU: {"num_parameters": (("weight",), 0)},
    torch.nn.RNNBase: {
        "input_size": (("weight_ih_l0",), 1),
        # With a projection, what goes round is that, and it has the cells' width.
        "hidden_size": (("weight_hr_l0", "weight_hh_l0"), 1),
        "proj_size": (("weight_hr_l0",), 0),
    },
}
# Classes that are not of torch, by name: transformers' Linear with the axes swapped.
NAMED_LAYERS = {"Conv1D": {"nx": (("weight",), 0), "nf": (("weight",), 1)}}

# Under weight norm and `torch.nn.utils.prune` a weight is made of another tensor.
_WEIGHTS = ("weight", "weight_v", "weight_orig")
_BY_WEIGHT = (
    *(torch.nn.modules.conv._ConvNd, torch.nn.LayerNorm, torch.nn.RMSNorm),
    torch.nn.GroupNorm,
)

COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_heads"),
    *("ssm_state_size", "time_step_rank"),
)
"""Attributes that may hold how many units, heads say, the layers inside have."""

QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Those of `COUNTS` that may be a multiple of the units."""

WIDTHS = (
    *("all_head_size", "attn_dim", "inner_dim", "split_size", "total_attn_dim"),
    *("intermediate_size", "ffn_dim", "d_ff", "hidden_features", "mlp_dim"),
    *("dim_attn", "dim_inner", "d_inner", "key_dim", "value_dim", "qkv_dim"),
    *("val_attn_dim", "in_features"),
)
"""Attributes that may hold the width of an axis of the layers inside."""

HEADS_LAST = ("bias_shape",)
"""Attributes that are shapes, the last axis of which is one of heads."""


class AxisChange(NamedTuple):
    """An axis of a tensor that became shorter.

    Attributes:
      owner: name of the module that has the tensor.
      before: positions of the axis.
      after: positions that are left.
      units: pairs of the units of a group on the axis, before and after.
    """

    owner: str
    before: int
    after: int
    units: tuple[tuple[int, int], ...]


def smaller_sizes(
    module: Any,
    cuts: Mapping[str, LeafCut],
    units: Mapping[str, Sequence[tuple[int, int]]],
) -> Attributes:
    """The attributes that change where tensors are cut.

    Args:
      module: the module before it is cut.
      cuts: {tensor name: what is kept of it}.
      units: {tensor name: units of each group that it lost some of, before and after}.

    Returns:
      {module name: {attribute: value}}.

    Raises:
      ValueError: a grouped layer would keep other numbers of channels in each group.
    """
    cuts, units = _by_every_name(module, cuts), _by_every_name(module, units)
    changed = {name: cut for name, cut in cuts.items() if cut.before != cut.after}
    parts = dict(module.named_modules(remove_duplicate=False))
    sizes: Attributes = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        values = _layer_sizes(owner, parts[owner], cuts)
        if values:
            sizes[owner] = values
    for change in _axis_changes(changed, units):
        for name in _ancestors(change.owner):
            values = _shared_sizes(parts[name], change)
            # A layer's own tensors say more than a name does.
            sizes[name] = {**values, **sizes.get(name, {})}
    # Only what differs: the report lists it, and `resize` sets it.
    changing = {
        name: {
            attribute: value
            for attribute, value in values.items()
            if _as_list(operator.attrgetter(attribute)(parts[name])) != value
        }
        for name, values in sizes.items()
    }
    return {name: values for name, values in changing.items() if values}


def without_configuration(attributes: Attributes) -> Attributes:
    """The attributes that are no fields of a module's configuration.

    Args:
      attributes: {module name: {attribute: value}}.

    Returns:
      The same without "config.num_attention_heads" and the like.
    """
    chosen = {
        name: {k: v for k, v in values.items() if not k.startswith("config.")}
        for name, values in attributes.items()
    }
    return {name: values for name, values in chosen.items() if values}


def _by_every_name(module: Any, values: Mapping[str, V]) -> dict[str, V]:
    """Values by the first names of tensors, and by all names of tied ones."""
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    first = {id(tensor): values[name] for name, tensor in tensors if name in values}
    return {name: first[id(tensor)] for name, tensor in tensors if id(tensor) in first}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _layer_sizes(owner: str, part: Any, cuts: Mapping[str, LeafCut]) -> dict[str, Any]:
    """The attributes of one layer that follow from its own tensors."""
    tensors = {
        name.rpartition(".")[2]: cut
        for name, cut in cuts.items()
        if name.rpartition(".")[0] == owner
    }
    weights = [tensors[name] for name in _WEIGHTS if name in tensors]
    if not weights and isinstance(part, _BY_WEIGHT):
        return {}  # it may be made of other tensors; the forward pass decides
    if isinstance(part, torch.nn.modules.conv._ConvNd):
        return _convolution_sizes(owner, part, weights[0])
    if isinstance(part, torch.nn.LayerNorm | torch.nn.RMSNorm):
        return {"normalized_shape": list(weights[0].after)}
    values: dict[str, Any] = {}
    # Subclasses, as timm has of every norm and convolution, keep these attributes.
    for layer, table in LAYERS.items():
        if isinstance(part, layer):
            values = _by_table(tensors, table)
    values = values or _by_table(tensors, NAMED_LAYERS.get(type(part).__name__, {}))
    if isinstance(part, torch.nn.GroupNorm):
        # Whole groups may go, each with its own mean; not channels inside of one.
        values["num_groups"] = _groups_left(owner, weights[0], 0, part.num_groups)
    return values


def _by_table(
    tensors: Mapping[str, LeafCut], table: Mapping[str, tuple[Sequence[str], int]]
) -> dict[str, Any]:
    values = {}
    for attribute, (names, axis) in table.items():
        shown = [tensors[name] for name in names if name in tensors]
        # A batch norm without scale has no weight, but statistics.
        if shown and shown[0].before != shown[0].after:
            values[attribute] = shown[0].after[axis]
    return values


def _convolution_sizes(owner: str, part: Any, weight: LeafCut) -> dict[str, Any]:
    """Channels and groups; weights are (out, in / groups, ...), transposed ones not."""
    # (in, out / groups, ...) for a transposed one: its first axis is the input's.
    names = (
        ("in_channels", "out_channels")
        if part.transposed
        else (
            "out_channels",
            "in_channels",
        )
    )
    # A depthwise convolution loses groups, a grouped one may lose channels of each.
    groups = 1 if part.groups == 1 else _groups_left(owner, weight, 0, part.groups)
    return {
        names[0]: weight.after[0],
        names[1]: weight.after[1] * groups,
        "groups": groups,
    }


def _groups_left(owner: str, cut: LeafCut, axis: int, groups: int) -> int:
    """How many groups of channels are left; each keeps as many channels."""
    size = cut.before[axis] // groups
    positions = cut.kept[0][axis]
    kept = np.arange(cut.before[axis]) if positions is None else positions
    # (groups left,): how many channels each keeps
    _, counts = np.unique(kept // size, return_counts=True)
    if len(sorted(set(counts.tolist()))) != 1:
        raise ValueError(
            f"a grouped layer must keep as many channels in each group, but {owner!r} "
            f"would keep {sorted(set(counts.tolist()))}; leave its channels out of "
            "sparsity="
        )
    return len(counts)


def _axis_changes(
    changed: Mapping[str, LeafCut], units: Mapping[str, Sequence[tuple[int, int]]]
) -> Iterator[AxisChange]:
    for name, cut in changed.items():
        # One change an axis: a square matrix may lose rows, columns or both.
        for before, after in zip(cut.before, cut.after, strict=True):
            if before != after:
                pairs = tuple(units.get(name, ()))
                yield AxisChange(name.rpartition(".")[0], before, after, pairs)


def _ancestors(name: str) -> Iterator[str]:
    """The module itself, what it is in, and what that is in."""
    # Two levels hold an attention's projections: (qkv, to_out.0).
    for _ in range(3):
        yield name
        if not name:
            return
        name = name.rpartition(".")[0]


def _shared_sizes(part: Any, change: AxisChange) -> dict[str, Any]:
    """The attributes by name that hold what an axis of a layer inside has lost."""
    values: dict[str, Any] = {}
    for path, value in _integers(part).items():
        name = path.rpartition(".")[2]
        if name in COUNTS:
            # The axis may be heads times features; what is counted are its units. A
            # unit is a key head where several query heads share one.
            counts = [
                value // before * after
                for before, after in sorted(change.units, reverse=True)
                if before == value or (value % before == 0 and name in QUERY_COUNTS)
            ]
            values |= {path: counts[0]} if counts else {}
        # (heads x features,): the whole axis, as a reshape of the class has it.
        elif path in WIDTHS and value == change.before:
            values[path] = change.after
    for path in HEADS_LAST:
        # (query position, key position, heads): a bias that the layers inside compute
        shape = vars(part).get(path)
        if isinstance(shape, tuple):
            counts = [after for before, after in change.units if before == shape[-1]]
            values |= {path: [*shape[:-1], counts[0]]} if counts else {}
    return values


def _integers(part: Any) -> dict[str, int]:
    """The attributes of a module that are integers, and those of its `config`."""
    config = getattr(part, "config", None)
    shared = vars(config) if hasattr(config, "__dict__") else {}
    # Some classes of transformers read their heads from the configuration that all
    # layers share: then each layer must lose as many, or the forward pass differs.
    values = {**vars(part), **{f"config.{name}": n for name, n in shared.items()}}
    return {path: value for path, value in values.items() if type(value) is int}
