"""Averages beside their formula."""

import numpy as np

from tests.support import oracles
from tests.support.trajectories import (
    leaves,
)

STEPS = 23


def assert_averages(tracked, recorded, kind="power", p=0.5, *, of=np.asarray, **when):
    """Equal to 1e-6 of the largest entry of the leaf."""
    actual, values = leaves(tracked), leaves(recorded)
    assert len(actual) == len(values) > 0
    for a, v in zip(actual, values, strict=True):
        expected = oracles.average(of(v), kind, p, **when)
        np.testing.assert_allclose(a, expected, rtol=0, atol=1e-6 * np.abs(v).max())
