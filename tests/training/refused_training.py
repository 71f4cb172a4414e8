"""What the transformations of training refuse."""

import jax.numpy as jnp
import optax

import jaxprune as jp
from tests.support.refusals import Refusal

PARAMS = {"w": jnp.ones((4, 4))}


def broken(params, importance):
    raise ValueError("soundtrack.npy has 3 rows")


def begun(step, **options):
    """An optimizer that prunes at a step, before its first step."""
    return jp.gradual(optax.adam(0.1), {step: 0.5}, **options).init(PARAMS)


REFUSED = {
    "gradual's criterion, by an error of its own at step 0": Refusal(
        lambda: begun(0, criterion=broken), r"^soundtrack.npy has 3 rows(\n|$)"
    ),
    "gradual's criterion, by an error of its own": Refusal(
        lambda: begun(1, criterion=broken), r"^soundtrack.npy has 3 rows(\n|$)"
    ),
    "a ranking by gradients before the first": Refusal(
        lambda: begun(0), "gradual needs a gradient before .* begin at step 1"
    ),
    "a statistic that the optimizer does not track": Refusal(
        lambda: begun(1, criterion="averaged_weight"),
        r"must be inside the optimizer .* jp.gradual\(optax.chain",
    ),
    "an optimizer without a mean of g^2": Refusal(
        lambda: jp.gradual(optax.adafactor(1e-2), {2: 0.5}).init(PARAMS),
        r"tracks nothing; Adafactor keeps [^()]*\);",
    ),
    "an optimizer that hides its moments": Refusal(
        lambda: jp.gradual(
            optax.flatten(optax.adam(0.1)), {1: 0.5}, criterion="magnitude", grow="set"
        ).init(PARAMS),
        "map_params cannot tell.*flatten",
    ),
}
