"""Exactly as many weights go as were asked for, whatever the pattern."""

import numpy as np
import pytest

import jaxprune as jp
from tests.support import oracles
from tests.support.small_models import (
    chain,
    correlated,
    draw,
    keep_per_output,
    keep_tiles,
    kernels_of,
    prune,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

PARAMS = chain([6, 6, 6, 6])
BATCHES = [correlated(i, 24, 6) / 3 for i in range(2)]


def masked(kernel, mask):
    return np.where(mask, kernel, 0)


def product(p, x):
    return x @ p["w"]


TIED = np.random.default_rng(0).integers(-2, 3, (12, 7)).astype(np.float32)
NO_ZEROS = np.where(TIED == 0, 1, TIED)
PATTERNS = {
    "unstructured": (
        jp.patterns.Unstructured(),
        lambda s: oracles.keep_top(s, oracles.removed_count(0.4, s.size)),
    ),
    "per output": (
        jp.patterns.PerOutput(),
        lambda s: keep_per_output(s, oracles.removed_count(0.4, s.size)),
    ),
    "2:4": (jp.patterns.NM(2, 4), lambda s: oracles.keep_nm(s, 2, 4)),
    "1:3": (jp.patterns.NM(1, 3), lambda s: oracles.keep_nm(s, 1, 3)),
    "blocks": (jp.patterns.Block(4, 2), lambda s: keep_tiles(s, 4, 2, 0.4)),
    "channels": (jp.patterns.Channel(), lambda s: oracles.keep_channels(s, 0.4)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("2:4", "blocks") else pytest.mark.full)
        for name in PATTERNS
    ],
)
def test_exactly_as_many_go_as_were_asked_for_and_ties_keep_the_first(name):
    pattern, keep = PATTERNS[name]
    sparsity = None if isinstance(pattern, jp.patterns.NM) else 0.4
    for weight in (TIED, NO_ZEROS, np.zeros_like(TIED)):
        pruned, report = prune(
            product, {"w": weight}, [draw(1, 5, 12)], "magnitude", sparsity,
            pattern=pattern,
        )  # fmt: skip
        mask = keep(np.abs(weight))
        np.testing.assert_array_equal(pruned["w"], masked(weight, mask))
        (row,) = report["weights"]
        assert row["zeros"] == (masked(weight, mask) == 0).sum()
        assert row["size"] == weight.size
        assert report["achieved"] == row["zeros"] / row["size"]


@pytest.mark.full
def test_every_method_takes_n_of_m():
    for method in jp.passes.METHODS:
        pruned, _ = prune(
            product,
            {"w": draw(1, 12, 8)},
            [correlated(2, 40, 12)],
            method,
            None,
            pattern=jp.patterns.NM(2, 4),
        )
        groups = (np.asarray(pruned["w"]) != 0).reshape(3, 4, 8)
        np.testing.assert_array_equal(groups.sum(1), np.full((3, 8), 2))


def test_nothing_goes_at_sparsity_zero():
    for method in ("magnitude", "wanda"):
        pruned, report = prune(run_chain, PARAMS, BATCHES, method, 0.0)
        assert same_bits(pruned, PARAMS)
        assert report["achieved"] == 0


def test_shares_are_given_by_glob_and_the_rest_keeps_all():
    pruned, report = prune(
        run_chain,
        PARAMS,
        BATCHES,
        "magnitude",
        {"layer_0/*": 0.25, "*_[02]/kernel": 0.75},
    )
    zeros = [int((k == 0).sum()) for k in kernels_of(pruned)]
    assert zeros == [9, 0, 27]
    assert report["achieved"] == sum(zeros) / (36 + 36 + 36)
    rows = {row["name"]: row["zeros"] for row in report["weights"]}
    assert rows["layer_0/kernel"] == 9
    assert rows["layer_2/kernel"] == 27
