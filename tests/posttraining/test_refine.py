"""Refinement lowers a block's error on held-out batches, and no zero moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.arrays.lazy import Leaves
from jaxprune.posttraining import refiner
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.relative_error import block_error
from tests.support import resumed
from tests.support.chained import chained
from tests.support.small_models import correlated, draw
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

WIDTH = 6


def parameters():
    """Two layers as lists, and a matrix before them."""
    layers = [
        {
            "norm": np.ones(WIDTH, np.float32),
            "up": draw(3 * i, WIDTH, WIDTH) / 2,
            "bias": np.zeros(WIDTH, np.float32),
            "down": draw(3 * i + 1, WIDTH, WIDTH) / 2,
        }
        for i in range(2)
    ]
    whole = {"inlet": draw(9, WIDTH, WIDTH) / 2, "layers": layers}
    return jax.tree.map(jnp.asarray, whole)


def layer(x, own):
    size = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    inner = jnp.sin((x / size * own["norm"][None]) @ own["up"] + own["bias"][None])
    return x + inner @ own["down"]


def run(p, x):
    x = jnp.tanh(x @ p["inlet"])
    for own in p["layers"]:
        x = layer(x, own)
    return x


def run_stacked(p, x):
    x = jnp.tanh(x @ p["inlet"])
    return jax.lax.scan(lambda x, own: (layer(x, own), None), x, p["layers"])[0]


def stacked(p):
    layers = jax.tree.map(lambda *own: jnp.asarray(np.stack(own)), *p["layers"])
    return p | {"layers": layers}


BATCHES = np.split(correlated(0, 64, WIDTH), 4)  # of one distribution
HELD_OUT = BATCHES[-1]
HOW = jp.passes.refine(passes=6, learning_rate=1e-2)


def prune(fn=run, params=None, batches=BATCHES, method="wanda", refine=HOW, **options):
    options = {"sparsity": 0.5, "progress": False} | options
    params = parameters() if params is None else params
    method = chained(method, refine=refine)
    return jp.prune_trained(fn, params, batches, method, **options)


def error(y, target):
    """The loss by its definition, float64."""
    y, target = np.asarray(y, np.float64), np.asarray(target, np.float64)
    return np.mean(np.sum((y - target) ** 2, -1) / np.sum(target**2, -1))


run_jitted = jax.jit(run)


def output_error(params):
    """That of the model's output on what is held out."""
    return error(run_jitted(params, HELD_OUT), run_jitted(parameters(), HELD_OUT))


@pytest.fixture(scope="module")
def refined():
    return prune()


@pytest.fixture(scope="module")
def solved():
    return prune(refine=None)


# What is trained.


def trained(fn, params, batch=BATCHES[0], prunable=lambda name, leaf: leaf.ndim > 1):
    traced = jp.trace(fn, params, batch)
    named = jp.tree.named_leaves(params)
    ops = [op for op in traced.linear_ops if prunable(op.leaf, named[op.leaf])]
    leaves = Leaves(jax.tree.leaves(params))
    program = SegmentedProgram(traced, leaves, ops, outputs=True)
    return [{v.leaf for v in own} for own in refiner.trained_values(program)]


def test_each_layer_trains_its_matrices_its_bias_and_the_norm_behind_it():
    assert trained(run, parameters()) == [
        {"inlet", "layers/0/norm"},
        {"layers/0/up", "layers/0/bias", "layers/0/down", "layers/1/norm"},
        {"layers/1/up", "layers/1/bias", "layers/1/down"},
    ]


def test_slices_of_stacked_layers_are_trained_where_they_are_used():
    found = trained(run_stacked, stacked(parameters()))
    flat = trained(run, parameters())
    assert [len(own) for own in found] == [len(own) for own in flat]


def test_what_two_layers_read_is_not_trained():
    def tied(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["b"][None])

    square = np.ones((WIDTH, WIDTH), np.float32)
    params = {"w": square, "v": square, "b": square[0]}
    assert trained(tied, params) == [{"w"}, {"v"}]


def test_a_matrix_that_is_not_pruned_is_not_trained():
    found = trained(run, parameters(), prunable=lambda name, leaf: "up" in name)
    assert not {"inlet", "layers/0/down", "layers/1/down"} & set().union(*found)


def test_a_matrix_of_one_output_is_no_vector():
    def scored(p, x):
        return jnp.tanh(x @ p["up"] + p["bias"]) @ p["head"]

    params = {
        "up": np.ones((WIDTH, 5), np.float32),
        "bias": np.ones((1, 5), np.float32),
        "head": np.ones((5, 1), np.float32),
    }
    assert trained(scored, params, prunable=lambda name, leaf: name == "up") == [
        {"up", "bias"}
    ]
    assert trained(scored, params, prunable=lambda name, leaf: name != "bias") == [
        {"up", "bias"},
        {"head"},
    ]


# What is made small.


relative_error = jax.jit(block_error)


def test_a_token_a_thousand_times_larger_weighs_as_much_as_any_other():
    y, target = draw(0, 20, 30, 4) + 3, draw(1, 20, 30, 4) + 3
    large = np.ones((20, 30, 1), np.float32)
    large[7, 11] = 1000
    y, target = y * large, target * large
    found = relative_error([y, 2 * y], [target, 2 * target], None)
    # What is added to each token's square is a thousandth of what is usual.
    np.testing.assert_allclose(found, error(y, target), rtol=3e-3)
    own = error(y[7, 11], target[7, 11])
    without = (
        np.delete(y.reshape(600, 4), 221, 0),
        np.delete(target.reshape(600, 4), 221, 0),
    )
    expected = (599 * error(*without) + own) / 600
    np.testing.assert_allclose(error(y, target), expected, rtol=1e-6)


def test_what_does_not_count_may_be_anything():
    y, target = draw(0, 2, 5, 4) + 3, draw(1, 2, 5, 4) + 3
    counted = np.arange(10).reshape(2, 5) % 3 > 0
    expected = error(y[counted], target[counted])
    y[~counted] = np.nan
    found = relative_error([y], [target], counted)
    np.testing.assert_allclose(found, expected, rtol=3e-3)


def test_the_floor_is_of_the_tokens_that_count():
    # One in twelve counts; a token of zeros has the floor alone for a size.
    y, target = draw(0, 24, 4) + 3, draw(1, 24, 4) + 3
    target[0] = 0
    counted = np.arange(24) % 12 == 0
    expected = relative_error([y[counted]], [target[counted]], None)
    found = relative_error([y], [target], counted)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.full
def test_a_linear_block_comes_to_the_least_squares_solution_under_its_mask():
    x, w = correlated(0, 24, WIDTH), draw(1, WIDTH, 3)
    x /= np.exp(np.arange(WIDTH) % 2)[None]
    how = jp.passes.refine(passes=600, learning_rate=3e-2, patience=600)
    result = prune(lambda p, x: x @ p["w"], {"w": w}, [x, x], refine=how)
    found = np.asarray(result.params["w"])
    # Each token is weighed by the norm of its target, and each output is by itself.
    share = np.linalg.norm(x.astype(np.float64) @ w, axis=1)[:, None]
    for out in range(3):
        kept = found[:, out] != 0
        best, *_ = np.linalg.lstsq(
            x[:, kept] / share, (x @ w[:, out]) / share[:, 0], rcond=None
        )
        # Flat directions of the loss are left where they were: the loss is compared.
        lost = [
            np.linalg.norm((x[:, kept] @ v - x @ w[:, out]) / share[:, 0])
            for v in (best, found[kept, out])
        ]
        assert lost[1] <= lost[0] * 1.001 + 1e-4
    assert result.report["weights"][0]["zeros"] == (found == 0).sum()


# What comes of it.


@pytest.mark.full
def test_zeros_are_exactly_those_of_the_solver_and_all_else_moves(refined, solved):
    found, before, given = jax.device_get((refined.params, solved.params, parameters()))
    same_zeros = jax.tree.map(
        lambda a, b: a.ndim < 2 or bool(((a == 0) == (b == 0)).all()), found, before
    )
    # Later blocks see other inputs; the first block's masks are the same.
    assert same_zeros["inlet"]
    for own in jax.tree.leaves(found):
        assert own.ndim < 2 or (own == 0).sum() == own.size / 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), found, given)
    assert all(jax.tree.leaves(moved))


@pytest.mark.full
def test_the_loss_on_held_out_batches_does_not_rise(refined):
    rows = refined.report["refined"]
    assert all(row["after"] <= row["before"] for row in rows)
    assert all(row["after"] == min(row["losses"]) for row in rows)
    assert any(row["after"] < row["before"] for row in rows)


@pytest.mark.full
def test_the_last_loss_is_that_of_the_models_output(refined):
    found, expected = refined.report["refined"][-1], output_error(refined.params)
    np.testing.assert_allclose(found["after"], expected, rtol=1e-2)


@pytest.mark.full
def test_a_rate_that_ruins_everything_changes_nothing(solved):
    result = prune(refine=jp.passes.refine(passes=2, learning_rate=0.9))
    rows = result.report["refined"]
    assert all(row["after"] == row["before"] for row in rows)
    assert same_bits(result.params, solved.params)


@pytest.mark.full
def test_stacked_layers_are_refined_like_those_in_a_list(refined):
    result = prune(run_stacked, stacked(parameters()))
    expected = stacked(refined.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        result.params,
        expected,
    )


@pytest.mark.full
def test_equal_blocks_share_their_steps(monkeypatch):
    built = []
    compiled = refiner._compiled
    monkeypatch.setattr(
        refiner, "_compiled", lambda *a: built.append(1) or compiled(*a)
    )
    params = parameters()
    counts = []
    for layers in (3, 5):
        built.clear()
        own = params | {"layers": [params["layers"][i % 2] for i in range(layers)]}
        own = jax.tree.map(jnp.array, own)
        programs = prune(params=own, refine=jp.passes.refine(passes=1)).report[
            "programs"
        ]
        counts.append((len(built), programs))
    assert counts[0] == counts[1]


@pytest.mark.full
def test_a_step_compiles_once_where_some_leaves_are_committed(monkeypatch):
    built = []
    make = refiner._compiled
    monkeypatch.setattr(
        refiner, "_compiled", lambda *a: built.append(make(*a)) or built[-1]
    )
    params = parameters()
    for own in params["layers"]:
        own["norm"] = jax.device_put(own["norm"], jax.devices()[0])
    prune(params=params, refine=jp.passes.refine(passes=1))
    assert [step._cache_size() for step in built] == [1] * len(built) != []


@pytest.mark.full
def test_either_kind_of_inputs_can_be_refined(refined, solved):
    dense = jp.passes.wanda(inputs="dense")
    pairs = [(refined, solved), (prune(method=dense), prune(method=dense, refine=None))]
    for result, before in pairs:
        assert output_error(result.params) < output_error(before.params)


@pytest.mark.full
def test_the_parameters_that_were_given_stay_unless_they_are_donated(refined):
    params = parameters()
    prune(params=params)
    assert same_bits(params, parameters())
    assert same_bits(prune(params=params, donate=True).params, refined.params)
    assert params["inlet"].is_deleted()
    assert not params["layers"][0]["norm"].is_deleted()


@pytest.mark.full
def test_bfloat16_weights_are_trained_in_float32_and_stored_as_they_were():
    params = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), parameters()
    )
    result = prune(params=params)
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype("bfloat16")}
    assert all(r["after"] <= r["before"] for r in result.report["refined"])


# A directory.


class Stopped(Exception):
    """On purpose."""


@pytest.mark.full
@pytest.mark.parametrize(("block", "in_training"), [(0, True), (1, False), (2, True)])
def test_a_job_killed_in_a_block_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, block, in_training, refined
):
    train, calls = refiner.Refiner.train, []

    def stop(loss):
        raise Stopped

    def stopping(self, number, shown):
        calls.append(number)
        if number < block:
            return train(self, number, shown)
        if in_training:
            train(self, number, stop)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(refiner.Refiner, "train", stopping)
        with pytest.raises(Stopped):
            prune(directory=tmp_path)
    assert calls == list(range(block + 1))
    calls.clear()
    monkeypatch.setattr(
        refiner.Refiner,
        "train",
        lambda self, number, shown: calls.append(number) or train(self, number, shown),
    )
    result = prune(directory=tmp_path)
    assert calls == list(range(block, 3))
    assert same_bits(result.params, refined.params)
    for ours, theirs in zip(
        result.report["refined"], refined.report["refined"], strict=True
    ):
        assert ours["losses"] == theirs["losses"]


@pytest.mark.full
def test_leaves_in_their_files_are_read_back_refined(tmp_path, refined, monkeypatch):
    params, found = parameters(), resumed.reads(monkeypatch)
    lazy = jax.tree.map(
        lambda x: jp.LazyArray(x.shape, x.dtype, lambda: jnp.array(x)), params
    )
    for again in (False, True):  # the second run takes all from the directory
        found.clear()
        result = prune(params=lazy, directory=tmp_path)
        read = jax.tree.map(
            lambda x: x.read() if isinstance(x, jp.LazyArray) else x, result.params
        )
        assert same_bits(read, refined.params)
        assert {*found} == {again}


@pytest.mark.full
def test_another_refinement_is_another_job(tmp_path):
    prune(directory=tmp_path)
    with pytest.raises(ValueError, match="refine"):
        prune(directory=tmp_path, refine=dataclasses.replace(HOW, passes=3))


@pytest.mark.full
def test_zeros_of_a_branch_that_is_computed_late_stay_zeros():
    def fn(params, x):
        deep = jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"]) @ params["w3"]
        return deep + x @ params["wide"]

    shapes = {"w1": (16, 12), "w2": (12, 12), "w3": (12, 1), "wide": (16, 1)}
    params = {
        name: draw(i, *shape) / shape[0] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }
    batches = [draw(i, 64, 16) for i in range(4, 8)]
    how = jp.passes.refine(passes=4, learning_rate=1e-2)
    found = jp.prune_trained(
        fn, params, batches, chained("wanda", refine=how), sparsity=0.5
    ).params
    zeros = {name: int((leaf == 0).sum()) for name, leaf in found.items()}
    assert zeros == {name: leaf.size // 2 for name, leaf in params.items()}
