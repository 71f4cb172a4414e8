"""What a refinement needs, and what it says where that is missing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.posttraining.test_refine import (
    BATCHES,
    HOW,
    parameters,
    prune,
    run,
    run_stacked,
    stacked,
)
from tests.support.small_models import quick_compilation as quick_compilation


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"passes": 0}, "passes=0"),
        ({"patience": 0}, "patience=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_what_is_no_training_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        jp.passes.refine(**wrong)


def test_a_number_of_passes_is_refused_with_the_way_out():
    with pytest.raises(
        TypeError,
        match=r"takes passes, got \[8\]; write jp\.passes\.refine\(passes=8\)",
    ):
        prune(refine=8)


def test_one_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="at least two batches"):
        prune(batches=BATCHES[:1], directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_function_that_returns_no_float_is_refused(tmp_path):
    with pytest.raises(ValueError, match="return the model's final states"):
        prune(lambda p, x: jnp.argmax(run(p, x), -1), directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stack_that_is_cast_before_it_is_sliced_is_refused(tmp_path):
    def run_cast(p, x):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        return run_stacked(half, x.astype(jnp.bfloat16)).astype(jnp.float32)

    def only(name, leaf):
        return name.startswith("layers/") and leaf.ndim > 2

    with pytest.raises(ValueError, match="cast it inside of the scan, or leave refine"):
        prune(run_cast, stacked(parameters()), prunable=only, directory=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.full
def test_a_batch_in_which_no_position_counts_is_left_out():
    refined_without = prune(
        batches=BATCHES[:3], refine=dataclasses.replace(HOW, passes=1)
    )
    blank = np.zeros(len(BATCHES[0]), bool)
    ones = ~blank
    counted = iter([blank, ones, ones, ones])
    found = prune(
        batches=[BATCHES[3], *BATCHES[:3]],
        positions=lambda batch: next(counted),
        refine=dataclasses.replace(HOW, passes=1),
    )
    first, other = found.report["refined"][0], refined_without.report["refined"][0]
    assert first["before"] == pytest.approx(other["before"], rel=1e-5)
    assert all(row["after"] < row["before"] for row in found.report["refined"])


@pytest.mark.parametrize("count", [(1, 1, 1, 0), (0, 0, 0, 1)])
def test_positions_that_count_nothing_on_one_side_are_refused(tmp_path, count):
    counted = iter(count)
    with pytest.raises(ValueError, match="positions counts nothing in one of the two"):
        prune(
            positions=lambda batch: np.full(len(batch), next(counted), bool),
            directory=tmp_path,
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("share", "batches"), [(0.75, 2), (0.9, 3), (0.1, 2)])
def test_something_is_left_to_train_on(share, batches):
    assert 0 < jp.passes.refine(held_out=share).split(batches) < batches
