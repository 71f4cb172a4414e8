"""What was tracked, found in the state of any optimizer.

A state says itself what it holds: its property `importance_fields` names those of its
fields that are fields of an `Importance`, or is empty where nothing under it belongs to
the weights (LoRA's moments are of its factors). Optax's own states are
listed here. `nnx.state(optimizer)` keeps only the names of fields, no types; there a
node is recognised by its names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import MaskedNode

from jaxprune.arrays import tree
from jaxprune.typing import Importance, Params

_SECOND_MOMENTS = {
    optax.ScaleByAdamState: "nu",
    optax.ScaleByAmsgradState: "nu",
    optax.ScaleByRmsState: "nu",
    optax.ScaleByRStdDevState: "nu",
    optax.ScaleByRssState: "sum_of_squares",
}
_SECOND_MOMENTS_BY_NAME = {
    frozenset(kind._fields): field for kind, field in _SECOND_MOMENTS.items()
}
_TRACK = {
    "weight": "chain jp.track_importance() last in the optimizer",
    "magnitude": "chain jp.track_importance(average=('magnitude',)) last",
    "square": (
        "train with Adam, AdamW, RMSProp or Adagrad, whose own second moment serves, "
        "or chain jp.track_gradients() first in the optimizer"
    ),
    "taylor": "chain jp.track_gradients(average=('taylor',)) first in the optimizer",
}


def get_importance(state: Any) -> Importance:
    """What was tracked, found anywhere inside an optimizer's state.

    Args:
      state: the state of any optax optimizer, however wrapped (`chain`, `masked`,
        `partition`, `MultiSteps`, ...), an `nnx.Optimizer` or its `nnx.state`; an
        `Importance` is returned as it is.

    Returns:
      The averages, like the parameters, as they are held and where; nothing is copied.
      `square` is the tracked E[g^2] where there is one, else the second moment of Adam,
      AMSGrad, RMSProp or Adagrad as it stands; inside `lora` there is none of the
      weights, so chain `track_gradients()` before it.
      Leaves nobody tracked are `optax.MaskedNode()`.

    Raises:
      ValueError: nothing is tracked in this state, or a leaf is tracked twice.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> state = optax.adamw(1e-3).init({"w": jnp.ones((2, 2))})
      >>> jp.get_importance(state).square["w"].shape
      (2, 2)
    """
    if isinstance(state, Importance):
        return state
    found = _found(state, _held) or _found(state, _held_by_name)
    averages = {field: trees for field, trees in found.items() if field != "moment"}
    if "square" not in averages and "moment" in found:
        averages["square"] = found["moment"]
    if not averages:
        raise ValueError(
            "this optimizer state tracks nothing; chain jp.track_importance() last: "
            "tx = optax.chain(optimizer, jp.track_importance())"
        )
    return Importance(**{k: _merged(trees, k) for k, trees in averages.items()})


def tracked(importance: Any, field: str, params: Params) -> list[Any]:
    """One statistic's leaves in the parameters' order, or one clear error."""
    refuse_swapped(params)
    statistic = None
    if importance is not None:
        statistic = getattr(get_importance(importance), field)
    if statistic is None:
        raise ValueError(
            f"this criterion needs Importance.{field}, which was not tracked; "
            f"{_TRACK[field]}, or choose another criterion"
        )
    return tree.align(params, statistic, f"Importance.{field}")


def refuse_swapped(params: Params) -> None:
    """Refuses an importance, or an optimizer's state, where parameters belong."""
    if (own := isinstance(params, Importance)) or _found(params, _held):
        what = "an Importance" if own else "an optimizer's state"
        raise TypeError(
            "a criterion takes the parameters first and the importance second, but got "
            f"{what} as the parameters; call criterion(params, importance)"
        )


def _held(node: Any) -> dict[str, str] | None:
    """Field of a node to field of `Importance`; None where the node is no state."""
    if (field := _SECOND_MOMENTS.get(type(node))) is not None:
        return {field: "moment"}
    fields = getattr(node, "importance_fields", None)
    return None if fields is None else dict(zip(fields, fields, strict=True))


def _held_by_name(node: Any) -> dict[str, str] | None:
    """The same of a node that kept the names of its fields and not its type."""
    if not isinstance(node, Mapping):
        return None
    names = frozenset(node)
    if (field := _SECOND_MOMENTS_BY_NAME.get(names)) is not None:
        return {field: "moment"}
    if names >= {"adapters", "inner"}:  # LoRA's
        return {}
    fields = names - {"step"}
    if "step" in names and fields and fields <= set(Importance._fields):
        return {field: field for field in fields}
    return None


def _found(
    state: Any, held: Callable[[Any], dict[str, str] | None]
) -> dict[str, list[Params]]:
    """What the nodes of a state hold, each field with all trees that were found."""
    found: dict[str, list[Params]] = {}
    nodes = jax.tree.leaves(state, is_leaf=lambda node: held(node) is not None)
    for node in nodes:
        for own, field in (held(node) or {}).items():
            by_name = isinstance(node, Mapping)
            if (average := node[own] if by_name else getattr(node, own)) is not None:
                found.setdefault(field, []).append(average)
    return found


def _merged(trees: list[Params], what: str) -> Params:
    """One tree of several that each watch some leaves (masked, partition)."""

    def only(*candidates: Any) -> Any:
        seen = [c for c in candidates if not tree.is_excluded(c)]
        if len(seen) > 1:
            raise ValueError(
                f"each leaf must be tracked once, but {len(seen)} transformations in "
                f"this state track the {what} of one leaf; remove all but one"
            )
        return seen[0] if seen else MaskedNode()

    return jax.tree.map(only, *trees, is_leaf=tree.is_leaf)
