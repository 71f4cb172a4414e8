"""What the criteria refuse."""

import functools

import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from tests.support.refusals import Refusal

KERNEL = np.arange(12, dtype=np.float32).reshape(4, 3)


def params():
    return {"layer": {"kernel": jnp.asarray(KERNEL)}}


def statistics(kernel=KERNEL, layer="layer", fields=jp.Importance._fields):
    """An importance with the fields asked for."""
    tree = {layer: {"kernel": jnp.asarray(kernel)}}
    return jp.Importance(
        *[tree if f in fields else None for f in jp.Importance._fields]
    )


def score(name, importance, **options):
    return getattr(jp.scores, name)(params(), importance, **options)


def above(rate):
    return jp.masks.above(score("threshold", statistics()), rate)


def swapped(name, first):
    return getattr(jp.scores, name)(first, params())


MISSING = {
    "averaged_weight": r"track_importance",
    "averaged_magnitude": r"track_importance\(.*magnitude",
    "obd": r"track_gradients",
    "preconditioned_magnitude": r"track_gradients",
    "taylor": r"track_gradients\(.*taylor",
}
PARTIAL = functools.partial
REFUSED = {
    **{
        f"{name} without its statistic": Refusal(
            PARTIAL(score, name, jp.Importance(None, None, None, None)), way_out
        )
        for name, way_out in MISSING.items()
    },
    **{
        f"{name} with an importance for parameters": Refusal(
            lambda name=name: swapped(name, statistics(fields=["square"])),
            "parameters first.* but got Importance",
            TypeError,
        )
        for name in ("magnitude", "preconditioned_magnitude", "taylor", "random")
    },
    **{
        f"{name} with a state for parameters": Refusal(
            lambda name=name: swapped(name, optax.adam(0.1).init(params())),
            "parameters first.* but got tuple",
            TypeError,
        )
        for name in ("magnitude", "preconditioned_magnitude", "taylor", "random")
    },
    "a state without squares": Refusal(
        lambda: score("preconditioned_magnitude", optax.sgd(0.1).init(params())),
        r"chain jp\.track_gradients\(\) first",
    ),
    "a state without averages": Refusal(
        lambda: score("averaged_weight", optax.sgd(0.1).init(params())),
        r"chain jp\.track_importance\(\) last",
    ),
    "a tree that is no state": Refusal(
        lambda: score("averaged_weight", {"layer": jnp.ones(3)}),
        r"chain jp\.track_importance\(\) last",
    ),
    "squares that nobody gives": Refusal(
        lambda: jp.scores.preconditioned_magnitude(params()),
        r"Importance\.square, which was not tracked",
    ),
    **{
        f"{name} of another model": Refusal(
            lambda name=name: score(name, statistics(layer="other")), r"layer|other"
        )
        for name in ("averaged_weight", "obd", "taylor")
    },
    **{
        f"{name} of another shape": Refusal(
            lambda name=name: score(name, statistics(KERNEL.T)), "layer/kernel"
        )
        for name in ("averaged_weight", "obd")
    },
    **{
        f"a threshold of {rate}": Refusal(PARTIAL(above, rate), r"threshold|rate")
        for rate in (-0.5, float("nan"), float("inf"))
    },
    "a threshold's unknown reading": Refusal(
        lambda: score("threshold", statistics(), compare="median"), "median"
    ),
    "a rule that matches nothing": Refusal(
        lambda: score("magnitude", None, prunable=lambda name, leaf: False), "prunable"
    ),
}
