"""What was tracked, found in the state of any optimizer.

A state says itself what it holds: its property `importance_fields` names those of its
fields that are fields of an `Importance`, or is empty where nothing under it belongs to
the weights (LoRA's moments are of its factors). Optax's own states are listed here, by
the names of their classes. `nnx.state(optimizer)` keeps only the names of fields, no
types; there a node is recognised by its names.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxprune.arrays import low_bit, merge, tree
from jaxprune.typing import Importance, Params

# A state's class in optax: which field is E[g^2], up to one factor, then all others.
_SECOND_MOMENTS = {
    "ScaleByAdamState": "nu mu count",
    "ScaleByAmsgradState": "nu mu nu_max count",
    "ScaleByRmsState": "nu",
    "ScaleByRmsWithCountState": "nu count",
    "ScaleByRStdDevState": "nu mu",
    "ScaleByRStdDevWithCountState": "nu mu count",
    "ScaleByRssState": "sum_of_squares",
    "ScaleByAdaDeltaState": "e_g e_x",
    "ScaleByAdemamixState": "nu m1 m2 count count_m2",
    "ScaleBySimplifiedAdEMAMixState": "n m t",
    "MadgradState": "grad_sum_sq s x0 count",
    "MomoAdamState": "exp_avg_sq exp_avg barf gamma lb count",
    "DAdaptAdamWState": (
        "exp_avg_sq exp_avg grad_sum estim_lr numerator_weighted count"
    ),
    "ProdigyState": (
        "exp_avg_sq exp_avg grad_sum params0 estim_lr numerator_weighted count"
    ),
}
_MOMENT = {state: fields.split()[0] for state, fields in _SECOND_MOMENTS.items()}
_MOMENT_BY_FIELDS = {
    frozenset(fields.split()): fields.split()[0] for fields in _SECOND_MOMENTS.values()
}
# States that keep something else, and what that is.
_NO_SECOND_MOMENTS = {
    "ScaleByBeliefState": "AdaBelief and ACProp keep the variance of the gradient",
    "ScaleByAdanState": "Adan keeps the square of an extrapolated gradient",
    "FactoredState": "Adafactor keeps sums over rows and columns",
    "ScaleBySM3State": "SM3 keeps maxima over rows and columns",
    "ScaleByNovogradState": "NovoGrad keeps one number a leaf",
    "SophiaState": "Sophia keeps a Hessian's diagonal",
    "GaLoreState": "GaLore's moments are of projected gradients",
}
_TRACK = {
    "weight": "chain jp.track_importance() last in the optimizer",
    "magnitude": "chain jp.track_importance(average=('magnitude',)) last",
    "square": (
        "chain jp.track_gradients() first, optax.chain(jp.track_gradients(), "
        "optimizer), or train with Adam, AdamW, RMSProp or Adagrad, whose own second "
        "moment serves"
    ),
    "taylor": "chain jp.track_gradients(average=('taylor',)) first in the optimizer",
}


def get_importance(state: Any) -> Importance:
    """The averages that were tracked, found anywhere in an optimizer's state.

    Args:
      state: the state of any optax optimizer, however wrapped (`chain`, `masked`,
        `partition`, `MultiSteps`, ...), an `nnx.Optimizer` or its `nnx.state`; an
        `Importance` is returned as it is.

    Returns:
      The averages, like the parameters, as they are held and where; nothing is copied.
      `square` is the tracked E[g^2] where there is one, else the second moment of the
      optimizer as it stands: of Adam and its kin, AMSGrad, RMSProp, Adagrad, Adadelta,
      AdEMAMix, MADGRAD, MoMo, D-Adaptation and Prodigy. Adamax and Yogi keep another
      statistic in Adam's own state, which nothing tells apart, as nothing tells
      AdaBelief's in `nnx.state(optimizer)`, which has no types. For these, and where
      the weights have none (inside `lora` and GaLore, for Adan, Adafactor, ...), chain
      `track_gradients()` before the optimizer. Where some leaves are tracked, an
      optimizer's moment of others does not stand in for theirs, since it has another
      scale; track them too. Leaves nobody tracked are `optax.MaskedNode()`.

    Raises:
      ValueError: nothing is tracked in this state, or a leaf is tracked twice.

    Warns:
      UserWarning: a tracker stands on the wrong side of the optimizer in a chain.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> state = optax.adamw(1e-3).init({"w": jnp.ones((2, 2))})
      >>> jp.get_importance(state).square["w"].shape
      (2, 2)
    """
    if isinstance(state, Importance):
        return state
    averages = _averages(state)
    if not averages:
        why = "; ".join(_why_not(state))
        raise ValueError(
            f"this optimizer state tracks nothing{why and f' ({why})'}; for "
            f"averages of the weights {_TRACK['weight']}, for squared gradients "
            f"{_TRACK['square']}"
        )
    return Importance(**averages)


def tracked(importance: Any, field: str, params: Params) -> list[Any]:
    """The leaves of one statistic in the parameters' order, or one clear error."""
    statistic, why = None, ""
    if isinstance(importance, Importance):
        statistic = getattr(importance, field)
    elif importance is not None:
        averages = _averages(importance)
        statistic = averages.get(field)
        reasons = ["this optimizer state tracks nothing"] * (not averages)
        why = "; ".join(reasons + _why_not(importance) * (field == "square"))
    if statistic is None:
        raise ValueError(
            f"this criterion needs Importance.{field}, which was not tracked"
            f"{why and f' ({why})'}; "
            f"{_TRACK[field]}, or choose another criterion"
        )
    return tree.align(params, statistic, f"Importance.{field}")


def is_state(node: Any) -> bool:
    """Whether it is an importance or a state that holds one, and no parameters."""
    return isinstance(node, Importance) or bool(_fields(node, _held))


def _averages(state: Any) -> dict[str, Params]:
    """Field of an `Importance` to the average of it that a state holds."""
    trees = _fields(state, _held)
    if not trees and isinstance(state, Mapping | list):  # optax's own are tuples
        trees = _fields(state, _held_by_name)
    # An optimizer's own moment serves only where nobody tracked E[g^2] itself.
    if moments := trees.pop("moment", []):
        trees.setdefault("square", moments)
    misplaced = _misplaced(state)
    if misplaced & {"weight", "magnitude"}:
        warnings.warn(
            "track_importance stands before the optimizer in this chain, where an "
            "update is still a gradient, so what it averaged are no weights; put it "
            "last, as in optax.chain(optimizer, jp.track_importance())",
            stacklevel=3,
        )
    if "square" in misplaced:
        warnings.warn(
            "track_gradients stands behind the optimizer in this chain, where an "
            "update is no gradient any more; put it first, as in "
            "optax.chain(jp.track_gradients(), optimizer)",
            stacklevel=3,
        )
    # Several transformations may each watch some leaves (masked, partition).
    return {
        field: functools.reduce(
            functools.partial(
                merge.disjoint,
                conflict="each leaf must be tracked once, but two transformations in "
                f"this state track the {field} of one leaf; remove all but one",
            ),
            averages,
        )
        for field, averages in trees.items()
    }


def _misplaced(state: Any) -> set[str]:
    """Fields that are averaged on the wrong side of an optimizer's moments."""
    if not isinstance(state, tuple | list | Mapping):
        return set()
    parts = list(state.values() if isinstance(state, Mapping) else state)
    fields = set[str]().union(*map(_misplaced, parts))
    if not isinstance(state, tuple) or hasattr(state, "_fields"):
        return fields  # not the state of `optax.chain`
    held = [_fields(part, _held) for part in parts]
    for first, second in itertools.combinations(held, 2):
        if ("moment" in first) == ("moment" in second):
            continue
        if _leaf_names(first).isdisjoint(_leaf_names(second)):
            continue  # each watches some leaves
        # The weights need the step that is really taken, the square the raw gradient.
        late = "moment" in first
        fields |= second.keys() & {"square"} if late else first.keys() - {"square"}
    return fields - {"taylor"}


def _leaf_names(held: Mapping[str, list[Params]]) -> set[str]:
    """The names of all leaves that a part of a chain holds something of."""
    return {
        name
        for average in itertools.chain.from_iterable(held.values())
        for name, leaf in tree.named_leaves(average).items()
        if not tree.is_excluded(leaf)
    }


def _optax_name(node: Any) -> str:
    """The name of a state's class if it is one of optax's."""
    state_class = type(node)
    return state_class.__name__ if state_class.__module__.startswith("optax.") else ""


def _why_not(state: Any) -> list[str]:
    """Why the states that keep something else than E[g^2] do not serve, each once."""

    def keeps_other(node: Any) -> bool:
        return _optax_name(node) in _NO_SECOND_MOMENTS

    nodes = filter(keeps_other, jax.tree.leaves(state, is_leaf=keeps_other))
    return [_NO_SECOND_MOMENTS[name] for name in dict.fromkeys(map(_optax_name, nodes))]


def _held(node: Any) -> dict[str, str] | None:
    """Field of a node to field of `Importance`; None where the node is no state."""
    name = _optax_name(node)
    if name in _MOMENT:
        return {_MOMENT[name]: "moment"}
    if name in _NO_SECOND_MOMENTS:
        return {}
    fields = getattr(node, "importance_fields", None)
    return None if fields is None else dict(zip(fields, fields, strict=True))


def _held_by_name(node: Any) -> dict[str, str] | None:
    """Like `_held`, for a node that lost its type (`nnx.state`)."""
    if not isinstance(node, Mapping):
        return None
    names = frozenset(node)
    if (field := _MOMENT_BY_FIELDS.get(names)) is not None:
        return {field: "moment"}
    if names >= {"adapters", "inner"}:  # LoRA's moments are of its factors
        return {}
    # Ours: a count of steps, averages, and the units of averages in one byte.
    fields = names - {"step", "exponents"}
    if "step" in names and fields and fields <= set(Importance._fields):
        return {field: field for field in fields}
    return None


def _field(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, Mapping) else getattr(node, name, None)


def _fields(
    state: Any, held: Callable[[Any], dict[str, str] | None]
) -> dict[str, list[Params]]:
    """The fields that the nodes of a state hold, each with all of its trees."""
    trees_by_field: dict[str, list[Params]] = {}
    nodes = jax.tree.leaves(state, is_leaf=lambda node: held(node) is not None)
    for node in nodes:
        for name, field in (held(node) or {}).items():
            if (average := _field(node, name)) is not None:
                # Codes of one byte come with their units.
                exponents = _field(_field(node, "exponents"), field)
                average = low_bit.with_exponents(
                    average, exponents, signed=field == "weight"
                )
                trees_by_field.setdefault(field, []).append(average)
    return trees_by_field
