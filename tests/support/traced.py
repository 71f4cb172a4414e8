"""What a trace is compared with."""

import equinox as eqx
import jax
import numpy as np

import jaxprune as jp
from tests.support.small_models import draw, filled, hessian

X = draw(0, 3, 5, 4)  # (batch, time, width)
FLAT = draw(1, 6, 4)


def shapes(traced):
    return {p.name: p.shape for p in traced.linear_ops}


def inputs_of(traced):
    return {p.name: p.input for p in traced.linear_ops}


def check(fn, params, x, by_hand, *, tolerance=1e-4, prunable=jp.tree.prunable):
    """Calibration gives the Hessians of the inputs that were noted."""
    found = jp.calibrate(fn, params, [x], hessian=True, prunable=prunable)
    assert set(found) == set(by_hand)
    for name, own in by_hand.items():
        own = np.asarray(own, np.float64).reshape(1, -1, np.shape(own)[-1])
        np.testing.assert_allclose(
            found[name].hessian, hessian(own), rtol=tolerance, atol=tolerance
        )


def divided(make, *args, **kwargs):
    """Arrays and the rest of an Equinox model."""
    abstract = eqx.filter_eval_shape(make, *args, key=jax.random.key(0), **kwargs)
    arrays, static = eqx.partition(
        abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    return filled(arrays), static
