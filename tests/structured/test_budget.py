"""Budgets: in parameters, bytes, FLOPs or time, met by some groups or by all."""

import numpy as np
import pytest

import jaxprune as jp
from tests.structured.test_shrunk_function import PARAMS, X, fn
from tests.support.small_models import quick_compilation as quick_compilation


@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
def test_a_budget_is_met_and_not_by_more_than_it_must(measure):
    scores = jp.scores.magnitude(PARAMS)
    result = jp.shrink(fn, PARAMS, [X], scores, keep={measure: 0.6})
    whole, left = result.report["before"][measure], result.report["after"][measure]
    assert left <= 0.6 * whole
    # One unit more of every group would be too much.
    more = (
        sum(2 * 8 * n for n in (1, 2))
        * {"parameters": 1, "bytes": 4, "flops": 6}[measure]
    )
    assert left + more > 0.6 * whole


def test_a_budget_may_be_met_with_some_groups_only():
    scores = jp.scores.magnitude(PARAMS)
    result = jp.shrink(
        fn, PARAMS, [X], scores, keep={"parameters": 0.8}, groups=("stack/*",)
    )
    assert result.params["up"].shape == (8, 6)
    # Of 248 parameters 198 may stay; a unit of both layers has 32.
    assert result.params["stack"]["up"].shape == (2, 8, 2)


def test_groups_may_lose_shares_in_proportion():
    scores, parts = jp.scores.magnitude(PARAMS), {"stack/*": 1.0, "down:0": 0.5}
    result = jp.shrink(fn, PARAMS, [X], scores, keep={"parameters": 0.6}, groups=parts)
    # Of 248 parameters 99.2 must go: two of four units in both layers and a quarter of
    # six have 64 + 32, three of four and three eighths have 96 + 32.
    assert result.params["stack"]["up"].shape == (2, 8, 1)
    assert result.params["up"].shape == (8, 4)
    alone = jp.shrink(
        fn, PARAMS, [X], scores, keep={"parameters": 0.8}, groups={**parts, "down:0": 0}
    )
    assert alone.params["up"].shape == (8, 6)


@pytest.mark.parametrize(
    "parts", [{}, (), {"down:0": -1.0, "stack/*": 1.0}, {"down:0": 0.0}, {"*": np.inf}]
)
def test_parts_that_are_no_proportion_are_refused(parts):
    scores = jp.scores.magnitude(PARAMS)
    with pytest.raises(ValueError, match="its share relative to the others"):
        jp.shrink(fn, PARAMS, [X], scores, keep={"parameters": 0.8}, groups=parts)


def test_a_group_keeps_a_number_that_it_may_keep():
    scores = jp.scores.magnitude(PARAMS)
    sizes = {"down:0": (1, 2, 4), "stack/*": iter([4, 1])}
    result = jp.shrink(fn, PARAMS, [X], scores, 0.5, sizes=sizes)
    # Three of six is as near to two as to four; two of four is nearer to one.
    assert result.params["up"].shape == (8, 4)
    assert result.params["stack"]["up"].shape == (2, 8, 1)
    part = jp.shrink(
        fn, PARAMS, [X], scores, keep={"stack/*": 0.5}, sizes={"down:0": [2]}
    )
    assert part.params["up"].shape == (8, 6)
    assert part.params["stack"]["up"].shape == (2, 8, 2)


@pytest.mark.parametrize("budget", [0.3, 0.45, 0.6, 0.75, 0.95])
def test_a_budget_is_met_by_the_numbers_that_groups_may_keep(budget):
    units, sizes = {"down:0": 6, "stack/*": 4}, {"down:0": [1, 2, 4], "stack/*": [3, 1]}

    def left(share, name):
        lost = min(round(share * units[name]), units[name] - 1)
        near = sorted(sizes[name], key=lambda n: (abs(units[name] - lost - n), -n))
        return near[0] if lost else units[name]

    shares = {k / n for n in units.values() for k in range(n)} | {1.0}
    ways = [(left(s, "down:0"), left(s, "stack/*")) for s in sorted(shares)]

    def fits(way):  # 24 weights of the head, 16 of a unit, 32 of one in both layers
        return 24 + 16 * way[0] + 32 * way[1] <= budget * 248

    layers = next(way for way in ways if fits(way))[1]
    # There are fewer numbers for the layers, so the other group is given back to.
    wanted = next((units, layers) for units, _ in ways if fits((units, layers)))
    scores = jp.scores.magnitude(PARAMS)
    result = jp.shrink(
        fn, PARAMS, [X], scores, keep={"parameters": budget}, sizes=sizes
    )
    found = (result.params["up"].shape[1], result.params["stack"]["up"].shape[2])
    assert found == wanted


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"down:0": (0, 7)}, "from 1 to 6 that down:0 may keep"),
        ({"nothing/*": (1,)}, "must match a group whose units can be removed"),
        ({"*": (1,), "down:0": (2,)}, "and that no earlier rule matches"),
    ],
)
def test_sizes_that_no_group_can_have_are_refused(sizes, told):
    scores = jp.scores.magnitude(PARAMS)
    with pytest.raises(ValueError, match=told):
        jp.shrink(fn, PARAMS, [X], scores, 0.5, sizes=sizes)


@pytest.mark.parametrize("groups", [["b:0"], {"*": 1.0}])
def test_groups_without_a_budget_are_refused_and_not_ignored(groups):
    scores = jp.scores.magnitude(PARAMS)
    with pytest.raises(ValueError, match="no budget; name them in keep"):
        jp.shrink(fn, PARAMS, [X], scores, 0.5, groups=groups)
