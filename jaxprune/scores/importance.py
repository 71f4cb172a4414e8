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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprune.arrays import low_bit, merge, tree
from jaxprune.typing import Importance, Params

# A state's class in optax: which field is E[g^2], up to one factor, and all its fields.
_SECOND_MOMENTS = {
    "ScaleByAdamState": ("nu", {"count", "mu", "nu"}),
    "ScaleByAmsgradState": ("nu", {"count", "mu", "nu", "nu_max"}),
    "ScaleByRmsState": ("nu", {"nu"}),
    "ScaleByRmsWithCountState": ("nu", {"count", "nu"}),
    "ScaleByRStdDevState": ("nu", {"mu", "nu"}),
    "ScaleByRStdDevWithCountState": ("nu", {"count", "mu", "nu"}),
    "ScaleByRssState": ("sum_of_squares", {"sum_of_squares"}),
    "ScaleByAdaDeltaState": ("e_g", {"e_g", "e_x"}),
    "ScaleByAdemamixState": ("nu", {"count", "count_m2", "m1", "m2", "nu"}),
    "ScaleBySimplifiedAdEMAMixState": ("n", {"t", "m", "n"}),
    "MadgradState": ("grad_sum_sq", {"count", "grad_sum_sq", "s", "x0"}),
    "MomoAdamState": (
        "exp_avg_sq",
        {"exp_avg", "exp_avg_sq", "barf", "gamma", "lb", "count"},
    ),
    "DAdaptAdamWState": (
        "exp_avg_sq",
        {"exp_avg", "exp_avg_sq", "grad_sum", "estim_lr", "numerator_weighted"}
        | {"count"},
    ),
    "ProdigyState": (
        "exp_avg_sq",
        {"exp_avg", "exp_avg_sq", "grad_sum", "params0", "estim_lr"}
        | {"numerator_weighted", "count"},
    ),
}
_SECOND_MOMENTS_BY_FIELDS = {
    frozenset(fields): field for field, fields in _SECOND_MOMENTS.values()
}
# What keeps something else, and what that is.
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
      AdEMAMix, MADGRAD, MoMo, D-Adaptation and Prodigy. Yogi's, in the same state as
      Adam's, is an estimate of its own. Where there is none of the weights (inside
      `lora` and GaLore, for AdaBelief, Adan, Adafactor, ...), chain `track_gradients()`
      before it. Where some leaves are tracked, an optimizer's moment of others does not
      stand in for theirs, since it has another scale; track them too.
      Leaves nobody tracked are `optax.MaskedNode()`.

    Raises:
      ValueError: nothing is tracked in this state, or a leaf is tracked twice.

    Warns:
      UserWarning: a chain has `track_importance` in front of its optimizer.
      UserWarning: the second moment may be Adamax's. Its state has Adam's type and a
        maximum of |g| where Adam's has the mean of g^2, so values are looked at, those
        that this process holds and not under `jit`; `gradual` and `straight_through`,
        which have the optimizer itself, refuse Adamax. Of `nnx.state(optimizer)`, which
        has no types, AdaBelief's variance passes for Adam's moment too; give the
        `nnx.Optimizer` itself.

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
        raise ValueError(
            f"this optimizer state tracks nothing{_in_brackets(_why_not(state))}; for "
            f"averages of the weights {_TRACK['weight']}, for squared gradients "
            f"{_TRACK['square']}"
        )
    return Importance(**averages)


def tracked(importance: Any, field: str, params: Params) -> list[Any]:
    """One statistic's leaves in the parameters' order, or one clear error."""
    refuse_swapped(params)
    statistic, why = None, ""
    if isinstance(importance, Importance):
        statistic = getattr(importance, field)
    elif importance is not None:
        averages = _averages(importance)
        statistic = averages.get(field)
        reasons = ["this optimizer state tracks nothing"] * (not averages)
        reasons += [_why_not(importance)] * (field == "square")
        why = _in_brackets(*reasons)
    if statistic is None:
        raise ValueError(
            f"this criterion needs Importance.{field}, which was not tracked{why}; "
            f"{_TRACK[field]}, or choose another criterion"
        )
    return tree.align(params, statistic, f"Importance.{field}")


def refuse_swapped(params: Params) -> None:
    """Refuses an importance, or an optimizer's state, where parameters belong."""
    if isinstance(params, Importance) or _found(params, _held):
        is_state = not isinstance(params, Importance)
        what = "an optimizer's state" if is_state else "an Importance"
        raise TypeError(
            "a criterion takes the parameters first and the importance second, but got "
            f"{what} as the parameters; call criterion(params, importance)"
        )


def _averages(state: Any) -> dict[str, Params]:
    """Field of an `Importance` to what a state holds of it."""
    trees_by_field = _found(state, _held)
    if not trees_by_field and isinstance(
        state, Mapping | list
    ):  # optax's own are tuples
        trees_by_field = _found(state, _held_by_name)
    # An optimizer's own moment serves only where nobody tracked E[g^2] itself.
    moments = trees_by_field.pop("moment", [])
    averages = {field: _merged(trees, field) for field, trees in trees_by_field.items()}
    if averages.keys() & _OF_WEIGHTS and _is_misplaced(state, _OF_WEIGHTS, "early"):
        warnings.warn(
            "track_importance stands before the optimizer in this chain, where an "
            "update is still a gradient, so what it averaged are no weights; put it "
            "last, as in optax.chain(optimizer, jp.track_importance())",
            stacklevel=3,
        )
    if "square" in averages and _is_misplaced(state, _OF_GRADIENTS, "late"):
        warnings.warn(
            "track_gradients stands behind the optimizer in this chain, where an "
            "update is no gradient any more; put it first, as in "
            "optax.chain(jp.track_gradients(), optimizer)",
            stacklevel=3,
        )
    if "square" not in averages and moments:
        averages["square"] = _merged(moments, "square")
        _warn_of_maxima(state)
    return averages


_OF_WEIGHTS = frozenset({"weight", "magnitude"})
"""The averages that need the step that is really taken."""
_OF_GRADIENTS = frozenset({"square"})
"""The average that needs the gradient before it becomes a step."""


def _is_misplaced(
    state: Any, fields: frozenset[str], when: Literal["early", "late"]
) -> bool:
    """Whether a chain has a tracker on the wrong side of an optimizer's moments."""
    if isinstance(state, tuple) and not hasattr(state, "_fields"):  # of optax.chain
        steps = [_found(part, _held) for part in state]
        names = [_leaf_names(held) for held in steps]  # a part may watch some leaves
        moments = [i for i, held in enumerate(steps) if "moment" in held]
        for i, held in enumerate(steps):
            if not held.keys() & fields or i in moments:
                continue
            others = [k for k in moments if not names[i].isdisjoint(names[k])]
            if any(i < k if when == "early" else i > k for k in others):
                return True
    parts = state.values() if isinstance(state, Mapping) else state
    nested = isinstance(state, tuple | list | Mapping)
    return nested and any(_is_misplaced(part, fields, when) for part in parts)


def _leaf_names(held: Mapping[str, list[Params]]) -> set[str]:
    """The names of all leaves that a part of a chain holds something of."""
    averages = itertools.chain.from_iterable(held.values())
    return {
        name
        for average in averages
        for name, leaf in tree.named_leaves(average).items()
        if not tree.is_excluded(leaf)
    }


def _optax_name(node: Any) -> str:
    """The name of a state's class if it is one of optax's."""
    state_class = type(node)
    return state_class.__name__ if state_class.__module__.startswith("optax.") else ""


def _in_brackets(*reasons: str) -> str:
    """The reasons that there are, as one aside."""
    reasons = tuple(filter(None, reasons))
    return f" ({'; '.join(reasons)})" if reasons else ""


def _why_not(state: Any) -> str:
    """Which states there are that keep something else than E[g^2]."""

    def reason(node: Any) -> str | None:
        # AdamaxState says it itself.
        default = getattr(node, "why_no_square", None)
        return _NO_SECOND_MOMENTS.get(_optax_name(node), default)

    nodes = jax.tree.leaves(state, is_leaf=lambda node: reason(node) is not None)
    # Each reason once, in the order of the state.
    return "; ".join(dict.fromkeys(filter(None, map(reason, nodes))))


def _held(node: Any) -> dict[str, str] | None:
    """Field of a node to field of `Importance`; None where the node is no state."""
    name = _optax_name(node)
    if name in _SECOND_MOMENTS:
        return {_SECOND_MOMENTS[name][0]: "moment"}
    if name in _NO_SECOND_MOMENTS:
        return {}
    fields = getattr(node, "importance_fields", None)
    return None if fields is None else dict(zip(fields, fields, strict=True))


def _held_by_name(node: Any) -> dict[str, str] | None:
    """The same of a node that kept the names of its fields and not its type."""
    if not isinstance(node, Mapping):
        return None
    names = frozenset(node)
    if (field := _SECOND_MOMENTS_BY_FIELDS.get(names)) is not None:
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


def _found(
    state: Any, held: Callable[[Any], dict[str, str] | None]
) -> dict[str, list[Params]]:
    """What the nodes of a state hold, each field with all trees that were found."""
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


def _merged(trees: list[Params], what: str) -> Params:
    """One tree of several that each watch some leaves (masked, partition)."""
    conflict = (
        "each leaf must be tracked once, but two transformations in this state track "
        f"the {what} of one leaf; remove all but one"
    )
    return functools.reduce(lambda a, b: merge.disjoint(a, b, conflict), trees)


def _warn_of_maxima(state: Any) -> None:
    """Says where what has Adam's type may be Adamax's."""

    def adams(node: Any) -> bool:
        by_name = isinstance(node, Mapping) and set(node) == {"count", "mu", "nu"}
        return by_name or _optax_name(node) == "ScaleByAdamState"

    nodes = filter(adams, jax.tree.leaves(state, is_leaf=adams))
    if any(_are_maxima(*(_field(x, k) for k in ("count", "mu", "nu"))) for x in nodes):
        warnings.warn(
            "the second moment in this state may be Adamax's, a maximum of |g| and not "
            "the mean of g^2: |mu| is under nu everywhere, which with Adam is so only "
            "if all gradients are large; with Adamax chain jp.track_gradients() first, "
            "with Adam pass jp.Importance(square=...) to be rid of this",
            stacklevel=2,
        )


def _are_maxima(count: Any, mu: Any, nu: Any) -> bool:
    """Whether |mu| is under Adamax's bound in all that this process holds."""
    # After t steps Adamax has |mu| <= nu (1 - b1^t), but for the decay of nu. Adam has
    # |mu| / nu >= 1 / |g| for a gradient g that stays. One leaf nearly always decides.
    # Inside `jit` nothing can be looked at, not even a state that it closes over.
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        return False
    moved = False
    for pair in zip(jax.tree.leaves(mu), jax.tree.leaves(nu), strict=True):
        if any(isinstance(x, jax.core.Tracer) for x in (*pair, count)):
            return False
        first, second = (jnp.asarray(x).addressable_data(0) for x in pair)
        steps = np.asarray(jax.tree.leaves(count)[0]).max()  # of seeds side by side
        # One shard is on one device; inside `jax.set_mesh` that is not the mesh's.
        with jax.set_mesh(Mesh(np.array([*first.devices()]), ("device",))):
            over, some = jax.device_get(_over(steps, first, second))
        if over:
            return False
        moved |= bool(some)
    return moved


@jax.jit
def _over(steps: Any, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
    size, bound = (jnp.abs(x).astype(jnp.float32) for x in (mu, nu))
    most = 1.02 * (1 - 0.9 ** steps.astype(jnp.float32))
    return jnp.any(size > most * bound), jnp.any(size > 0)
