"""Matrices that make up for what those before them lost."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jaxprune as jp
from jaxprune.posttraining.solvers import alps, dense_target, sparsegpt
from jaxprune.posttraining.solvers.dense_target import corrected
from tests.support import small_models
from tests.support.chained import chained
from tests.support.small_models import (
    chain,
    chain_by_hand,
    correlated,
    draw,
    hessian,
    kernels_of,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

WIDTH, SAMPLES, DAMPING = 16, 40, 0.01
MORE = 10  # times the solver's damping
SOLVERS = {"sparsegpt": sparsegpt.solve, "alps": alps.solve}
BATCHES = [correlated(i, SAMPLES, WIDTH) for i in range(4)]
# So little that no bit of a weight changes, while the dense model runs beside.
NEXT_TO_NOTHING = 1e-30


def residual(params, x):
    """Two layers that add to their inputs; the second's leaves are stacked on them."""
    for i in range(2):
        x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return x @ params["out"]


def parallel(params, x):
    """Branches side by side: the products of the first are needed after the second."""
    for i in range(2):
        first = jnp.sin(x @ params["up"][i]) @ params["down"][i]
        x = x + jnp.tanh(x @ params["wide"][i]) @ params["narrow"][i] + first
    return x @ params["out"]


# Matrices of one shape: one program solves for all.
PARAMS = {
    "up": jnp.asarray(draw(0, 2, WIDTH, WIDTH) / 4),
    "down": jnp.asarray(draw(1, 2, WIDTH, WIDTH) / 4),
    "out": jnp.asarray(draw(2, WIDTH, WIDTH)),
}
BOTH = PARAMS | {
    "wide": jnp.asarray(draw(3, 2, WIDTH, WIDTH) / 4),
    "narrow": jnp.asarray(draw(4, 2, WIDTH, WIDTH) / 4),
}
MODELS = {"residual": (PARAMS, residual), "parallel": (BOTH, parallel)}
run_residual, run_parallel = jax.jit(residual), jax.jit(parallel)


def method(name="sparsegpt", correction=0.75, **settings):
    return chained(jp.passes.METHODS[name](**settings), jp.passes.correct(correction))


def prune(
    how,
    params=PARAMS,
    fn=residual,
    batches=BATCHES,
    quantize=None,
    **options,
):
    options = {"sparsity": 0.5} | options
    how = chained(how, quantize=quantize)
    return small_models.prune(fn, params, batches, how, **options)


def lost_output(run, params, dense, x):
    """What the outputs lack of the dense model's, and those."""
    whole, left = jax.device_get((run(dense, x), run(params, x)))
    return whole - left, whole


def by_least_squares(weight, x, dense):
    """argmin_U |D W - X U|^2 + 10 damping |U - W|^2, summed over samples, float64."""
    weight, x, dense = (np.asarray(own, np.float64) for own in (weight, x, dense))
    size = np.sqrt(MORE * DAMPING * np.square(x).sum() / x.shape[1])
    left = np.concatenate([x, size * np.eye(x.shape[1])])
    right = np.concatenate([dense @ weight, size * weight])
    return np.linalg.lstsq(left, right, rcond=None)[0]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_it_is_the_least_squares_solution_or_a_share_of_the_way(share):
    x, dense, weight = BATCHES[0], draw(1, SAMPLES, WIDTH), draw(2, WIDTH, 5)
    drift = x.T @ (dense - x) / SAMPLES
    own = np.float32(hessian(x[None])[0])
    found = corrected(weight, own, drift, share=share, damping=DAMPING)
    whole = by_least_squares(weight, x, dense)
    expected = weight + share * (whole - weight)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_matrix_of_several_blocks_is_solved_for_alike():
    inputs = 2 * dense_target._BLOCK + 7
    x, dense = draw(0, 64, inputs), draw(1, 64, inputs)
    weight = draw(2, inputs, 3)
    own = np.float32(hessian(x[None])[0])
    drift = x.T @ (dense - x) / 64
    found = corrected(weight, own, drift, share=1.0, damping=0.01)
    damped = own + MORE * 0.01 * np.float64(own).trace() / inputs * np.eye(inputs)
    expected = weight + np.linalg.solve(damped, drift @ weight)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_where_nothing_drifted_or_nothing_was_seen_the_weight_stays_bit_for_bit():
    weight, nothing = draw(2, WIDTH, 5), np.zeros((WIDTH, WIDTH), np.float32)
    how = {"share": 1.0, "damping": DAMPING}
    own = np.float32(hessian(BATCHES[0][None])[0])
    assert same_bits(corrected(weight, own, nothing, **how), weight)
    assert same_bits(corrected(weight, nothing, nothing, **how), weight)


def test_a_hessian_that_no_damping_makes_one_leaves_the_weight():
    weight, drift = draw(2, WIDTH, 5), np.ones((WIDTH, WIDTH), np.float32)
    wrong = np.diag(np.float32([WIDTH] + [-1] * (WIDTH - 1)))
    how = {"share": 1.0, "damping": DAMPING}
    assert same_bits(corrected(weight, wrong, drift, **how), weight)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "relative"), [("sparsegpt", True), ("sparsegpt", False), ("alps", True)]
)
def test_each_matrix_is_solved_for_the_outputs_of_the_dense_model(name, relative):
    params, share, solve = chain([WIDTH] * 4), 0.75, SOLVERS[name]
    dense_inputs, _ = chain_by_hand(params, BATCHES)

    def by_hand(i, kernel, x):
        dense = dense_inputs[i]
        if relative:
            size = np.sqrt(np.square(x).mean(-1, keepdims=True))
            x, dense = x / size, dense / size
        target = kernel + share * (by_least_squares(kernel, x, dense) - kernel)
        own = jnp.asarray(hessian(x[None])[0], np.float32)
        kept = np.uint32(kernel.size // 2)
        return solve(jnp.asarray(target, np.float32), own, kept).weight

    _, expected = chain_by_hand(params, BATCHES, by_hand)
    found = prune(method(name, share, relative=relative), params, run_chain)
    for own, other in zip(kernels_of(found.params), expected, strict=True):
        np.testing.assert_array_equal(own != 0, other != 0)
        np.testing.assert_allclose(own, other, rtol=5e-3, atol=5e-3)


@pytest.mark.full
@pytest.mark.parametrize("name", SOLVERS)
def test_the_whole_is_nearer_to_the_dense_model(name):
    batches = [draw(i, SAMPLES, WIDTH) for i in range(10, 18)]

    def apart(correction):
        params = prune(method(name, correction), batches=batches).params
        lost = [lost_output(run_residual, params, PARAMS, x)[0] for x in batches]
        return np.square(lost).sum()

    assert apart(0.75) < 0.8 * apart(0.0)


@pytest.mark.full
def test_before_anything_is_pruned_there_is_nothing_to_make_up_for():
    sparsity = {"up*": 0.0, "down*": 0.0, "out": 0.5}
    found, without = (
        prune(method(correction=c), sparsity=sparsity) for c in (1.0, 0.0)
    )
    assert same_bits(found.params, without.params)


@pytest.mark.full
def test_a_dense_model_that_is_not_finite_beside_a_pruned_one_that_is_is_refused():
    batches = [draw(i, SAMPLES, WIDTH) for i in range(10, 14)]
    most = max(np.abs(x @ np.asarray(PARAMS["up"])[0]).max() for x in batches)

    def fn(params, x):
        hidden = x @ params["up"][0]
        return jnp.where(hidden > 0.9 * most, np.inf, hidden) @ params["down"][0]

    sparsity = {"up*": 0.97, "down*": 0.5}
    how = {"fn": fn, "sparsity": sparsity, "batches": batches}
    prune(method(correction=0.0), **how)
    with pytest.raises(ValueError, match=r"input of 'down.*must be finite"):
        prune(method(), **how)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
def test_the_error_in_the_report_is_that_of_the_dense_models_output(model):
    params, fn = MODELS[model]
    found = prune(method(), params, fn)
    row = found.report["weights"][-1]
    assert row["name"] == "out"
    lost, whole = lost_output(jax.jit(fn), found.params, params, BATCHES[0])
    expected = np.square(lost).sum() / np.square(whole).sum()
    assert row["error"] == pytest.approx(expected, rel=1e-4)


def test_what_does_not_count_is_in_no_sum():
    def spoiled(x):
        return np.concatenate([x, np.full_like(x[:7], np.nan)])

    def counted(x):
        return jnp.arange(len(x)) < SAMPLES

    found = prune(method(), batches=[spoiled(x) for x in BATCHES], positions=counted)
    expected = prune(method())
    for name, leaf in jax.device_get(found.params).items():
        other = np.asarray(expected.params[name])
        np.testing.assert_array_equal(leaf != 0, other != 0)
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
def test_the_dense_model_beside_changes_nothing_by_itself(model):
    found = prune(method(correction=NEXT_TO_NOTHING), *MODELS[model])
    without = prune(method(correction=0.0), *MODELS[model])
    assert same_bits(found.params, without.params)


def test_a_branch_makes_up_for_the_branch_beside_it():
    """`down` is the product of `up` that only the next layer needs."""
    sparsity = {"up/*": 0.5, "*": 0.0}
    how = {"params": BOTH, "fn": parallel, "sparsity": sparsity}
    found, without = (prune(method(correction=c), **how).params for c in (1.0, 0.0))
    found, without, dense = jax.device_get((found, without, BOTH))
    assert not np.array_equal(found["down"][0], without["down"][0])
    # What has nothing pruned before it has nothing to make up for.
    assert same_bits(found["wide"][0], dense["wide"][0])
    assert same_bits(found["narrow"][0], dense["narrow"][0])


@pytest.mark.full
def test_it_ends_nearer_where_branches_lie_side_by_side():
    batches = [draw(i, SAMPLES, WIDTH) for i in range(10, 18)]

    def apart(correction):
        chain = method(correction=correction)
        params = prune(chain, BOTH, parallel, batches=batches).params
        lost = [lost_output(run_parallel, params, BOTH, x)[0] for x in batches]
        return np.square(lost).sum()

    assert apart(0.75) < apart(0.0)


@pytest.mark.full
def test_leaves_of_two_bytes_are_corrected_in_four_and_stay_so():
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), PARAMS)
    found = jax.device_get(prune(method(), narrow).params)
    wide = jax.tree.map(lambda x: x.astype(np.float32), narrow)
    expected = jax.device_get(prune(method(), wide).params)
    for name, leaf in found.items():
        assert leaf.dtype == jnp.bfloat16
        same = (leaf != 0) == (expected[name] != 0)
        assert same.mean() > 0.9  # the next layer's input is rounded too


@pytest.mark.full
def test_kept_weights_are_two_of_four_and_on_levels_where_both_are_asked_for():
    how = {"sparsity": None, "pattern": "2:4", "quantize": jp.passes.quantize("int4")}
    found = prune(method(), **how).params
    assert not np.array_equal(
        found["out"], prune(method(correction=0.0), **how).params["out"]
    )
    for name in ("up", "down"):
        for matrix in np.asarray(found[name]):
            fours = (matrix != 0).reshape(-1, 4, matrix.shape[1])
            assert (fours.sum(1) <= 2).all()
            for column in matrix.T:  # one group of inputs each: seven levels and zero
                assert len(np.unique(np.abs(column[column != 0]))) <= 7


@pytest.mark.full
def test_donated_or_lazy_parameters_give_the_same_bits(tmp_path):
    expected = prune(method()).params
    given = jax.tree.map(jnp.array, jax.device_get(PARAMS))
    assert same_bits(prune(method(), given, donate=True).params, expected)
    lazy = jax.tree.map(
        lambda leaf: jp.LazyArray(leaf.shape, leaf.dtype, lambda: jnp.array(leaf)),
        jax.device_get(PARAMS),
    )
    found = prune(method(), lazy, directory=tmp_path).params
    assert same_bits(jax.tree.map(lambda leaf: leaf.read(), found), expected)


@pytest.mark.full
def test_over_a_mesh_it_is_bit_for_bit_that_of_one_device():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    found = prune(method(), mesh=mesh)
    assert same_bits(
        jax.device_get(found.params), jax.device_get(prune(method()).params)
    )


@dataclasses.dataclass(frozen=True)
class Stopping(jp.passes.sparsegpt):
    """SparseGPT that fails after so many weights."""

    left: ClassVar[list[int]] = [0]

    def solve(self, matrix):
        # When it runs, not when it is traced.
        kind = jax.ShapeDtypeStruct((), np.float32)
        weight = matrix.weight + io_callback(self.meet, kind, matrix.weight)[None, None]
        return super().solve(matrix._replace(weight=weight))

    @staticmethod
    def meet(_):
        if not Stopping.left[0]:
            raise RuntimeError("stopped on purpose")
        Stopping.left[0] -= 1
        return np.zeros((), np.float32)


def stopping():
    return chained(Stopping(), jp.passes.correct(0.75))


@pytest.mark.parametrize("weights", [1, 3])
def test_a_job_that_was_stopped_ends_with_the_same_bits(weights, tmp_path):
    Stopping.left[0] = 100
    whole = prune(stopping())
    Stopping.left[0] = weights
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        prune(stopping(), directory=tmp_path)
    Stopping.left[0] = 100
    found = prune(stopping(), directory=tmp_path)
    assert Stopping.left[0] == 100 - (5 - weights)
    assert same_bits(found.params, whole.params)
    errors = [[row["error"] for row in own.report["weights"]] for own in (found, whole)]
    assert errors[0] == errors[1]


def ragged(params, x):
    x = jnp.tanh(x @ params["first"])
    first = jnp.sum(x[:, 0] > 0)
    sizes = jnp.stack([first, len(x) - first]).astype(np.int32)
    order = jnp.argsort(-x[:, 0])
    return jax.lax.ragged_dot(x[order], params["experts"], sizes)


def by_capacity(params, x):
    x = jnp.tanh(x @ params["first"])
    slots = jnp.argsort(x[:, :2], axis=0)[-8:].T  # (experts, capacity)
    return jnp.einsum("eci,eio->eco", x[slots], params["experts"])


@pytest.mark.full
@pytest.mark.parametrize("fn", [ragged, by_capacity])
def test_experts_are_pruned_without_it(fn):
    """Rows that the dense model sends to other experts are not compared."""
    params = {"first": PARAMS["out"], "experts": jnp.asarray(draw(5, 2, WIDTH, 4))}
    found = prune(method(correction=1.0), params, fn).params
    assert same_bits(found, prune(method(correction=0.0), params, fn).params)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"correction": 1.5}, r"share in \[0, 1\], got 1.5"),
        ({"correction": -0.1}, r"share in \[0, 1\], got -0.1"),
        ({"correction": float("nan")}, r"share in \[0, 1\], got nan"),
        ({"correction": "0.5"}, r"share in \[0, 1\], got '0.5'"),
        ({"correction": True}, r"share in \[0, 1\], got True"),
        ({"correction": None}, r"share in \[0, 1\], got None"),
        ({"inputs": "dense"}, 'but inputs="dense" was given; leave one of the two'),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(how, words):
    with pytest.raises(ValueError, match=words):
        prune(method(**how))
