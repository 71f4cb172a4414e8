"""The criteria that the experiments compare, by the names used in results and plots."""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.typing import Params, Scores


class Watched(NamedTuple):
    """What a training run leaves to rank weights by.

    Attributes:
      params: the trained parameters.
      tracked: averages of jaxprune's own transformations.
      adam: the same with Adam's second moment in place of the tracked E[g^2].
      start: makes the parameters that training began with.
    """

    params: Params
    tracked: jp.Importance
    adam: jp.Importance
    start: Callable[[], Params]


def _family(exponent: float, of_average: bool, watched: Watched) -> Scores:
    """|w| or |A| times E[g^2]^exponent."""
    weights = watched.tracked.weight if of_average else watched.params
    return jp.scores.preconditioned_magnitude(
        weights, watched.tracked, exponent=exponent
    )


def _movement(watched: Watched) -> Scores:
    """|w - w before training|: how far each weight went."""
    # The start is made again, from the seed or the directory, so no copy of it is held.
    moved = jax.tree.map(jnp.subtract, watched.params, watched.start())
    return jp.scores.magnitude(moved)


GRADUAL = "gradual"
"""Ranks as "preconditioned_magnitude" does; the steps after training prune, in place of
holding what was pruned before them."""

EXPONENTS = (0.125, 0.19, 0.25, 0.31, 0.375, 0.5)

CRITERIA: dict[str, Callable[[Watched], Scores]] = {
    "preconditioned_magnitude": lambda w: jp.scores.preconditioned_magnitude(
        w.params, w.tracked
    ),
    GRADUAL: lambda w: jp.scores.preconditioned_magnitude(w.params, w.tracked),
    "preconditioned_adam": lambda w: jp.scores.preconditioned_magnitude(
        w.params, w.adam
    ),
    "averaged_weight": lambda w: jp.scores.averaged_weight(w.params, w.tracked),
    "magnitude": lambda w: jp.scores.magnitude(w.params),
    "averaged_magnitude": lambda w: jp.scores.averaged_magnitude(w.params, w.tracked),
    "obd": lambda w: jp.scores.obd(w.params, w.tracked),
    "taylor": lambda w: jp.scores.taylor(w.params, w.tracked),
    "movement": _movement,
    "random": lambda w: jp.scores.random(w.params),
    "threshold_weight": lambda w: jp.scores.threshold(w.params, w.tracked),
    "threshold_average": lambda w: jp.scores.threshold(
        w.params, w.tracked, compare="average"
    ),
    **{
        f"{prefix}preconditioned_{exponent}": functools.partial(
            _family, exponent, of_average
        )
        for exponent in EXPONENTS
        for prefix, of_average in (("", False), ("averaged_", True))
    },
}
"""Name to criterion. The last twelve are the family that the default was chosen from:
preconditioned_P is |w| E[g^2]^P, averaged_preconditioned_P has |A| in the place of
|w|."""

_NEEDED = {
    "preconditioned_magnitude": {"square"},
    GRADUAL: {"square"},
    "preconditioned_adam": set(),
    "preconditioned": {"square"},
    "averaged_preconditioned": {"square", "weight"},
    "averaged_magnitude": {"magnitude"},
    "averaged_weight": {"weight"},
    "obd": {"square"},
    "taylor": {"taylor"},
    "threshold_weight": {"weight"},
    "threshold_average": {"weight"},
}


def averages(criteria: Collection[str]) -> frozenset[str]:
    """The fields of `jp.Importance` that these criteria need."""
    fields: set[str] = set()
    for name in criteria:
        # "averaged_preconditioned_0.25" needs what "averaged_preconditioned" does.
        stem, _, suffix = name.rpartition("_")
        fields |= _NEEDED.get(stem if suffix[:1].isdigit() else name, set())
    return frozenset(fields)
