"""Both orders of a step are compiled and timed, and one holds less."""

import json

import pytest

pytest.importorskip("tyro")

from benchmarks import leaf_by_leaf


@pytest.mark.full
def test_leaf_by_leaf_holds_less_beside_the_weights(capsys):
    leaf_by_leaf.main(leaf_by_leaf.Config(layers=2, rounds=1))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    all_at_once, one_at_a_time = report["orders"].values()
    assert one_at_a_time["beside"] < all_at_once["beside"] / 1.5
    assert min(row["seconds"]["min"] for row in report["orders"].values()) > 0
