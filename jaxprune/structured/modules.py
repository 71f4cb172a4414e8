"""The smaller function as a module of its class again: Flax NNX, Linen or Equinox.

The arrays are the result's. A class also keeps sizes as attributes
(`jaxprune.structured.module_sizes`): some follow from the arrays, others are tried, and
the forward pass decides which module is the right one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays import tree
from jaxprune.arrays.messages import first_line, listed
from jaxprune.structured.module_sizes import (
    Attributes,
    choices,
    layer_sizes,
    tried_sizes,
)
from jaxprune.structured.output_difference import relative_difference

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
    layers = layer_sizes(parts, cuts)
    tried = tried_sizes(parts, cuts, result.report["groups"], layers)
    reference = result.fn(result.params, batch)
    reason = ""
    for chosen in choices(tried):
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
    raise ValueError(
        "a smaller module needs its sizes in attributes that can be set, but "
        f"{type(model).__name__} cannot have them ({reason}); give call= if it takes "
        "more than a batch, make it with the smaller sizes and load params, or use fn "
        "of the result"
    )


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
    if not names:
        raise TypeError(
            "a module is one of Flax NNX, Flax Linen or Equinox, got "
            f"{type(model).__name__}; use fn and params of the result"
        )
    return _FRAMEWORKS[names[0]]


def _nnx_parts(model: Any) -> Iterator[tuple[str, Any]]:
    from flax import nnx

    for path, part in nnx.iter_modules(model):
        yield "/".join(map(str, path)), part


def _nnx_built(model: Any, arrays: Mapping[str, Any], attributes: Attributes) -> Any:
    from flax import nnx

    graphdef, state = nnx.split(model)
    left = _left_behind(tree.named_leaves(state), arrays)
    if left:
        raise ValueError(
            f"{listed(left)} must be cut too, but are none of the parameters; split "
            "them off together: nnx.split(model, (nnx.Param, nnx.BatchStat), ...)"
        )
    small = nnx.merge(graphdef, _with_arrays(state, arrays))
    parts = dict(_nnx_parts(small))
    for (path, name), value in attributes.items():
        setattr(parts[path], name, value)
    return small


def _left_behind(leaves: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[str]:
    """Leaves that are no parameters and have a size that one beside them had."""
    before = {
        (name.rpartition("/")[0], jnp.shape(leaves[name]))
        for name, array in arrays.items()
        if name in leaves and jnp.shape(leaves[name]) != array.shape
    }
    return [
        name
        for name, leaf in leaves.items()
        if name not in arrays and (name.rpartition("/")[0], jnp.shape(leaf)) in before
    ]


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
    seen: dict[int, Any] = {}  # a module that stands in two fields stays one

    def built(part: Any, path: str) -> Any:
        if id(part) not in seen:
            seen[id(part)] = changed(part, path)
        return seen[id(part)]

    def changed(part: Any, path: str) -> Any:
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
