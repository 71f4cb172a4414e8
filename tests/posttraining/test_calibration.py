"""What weights see: mean squares and Hessians against float64 NumPy, over batches."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.small_models import (
    chain,
    chain_by_hand,
    correlated,
    draw,
    hessian,
    mean_square,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation

BATCHES = [correlated(i, 12, 6) for i in range(3)]
PARAMS = chain([6, 6, 6])
W = draw(0, 4, 4)


def product(p, x):
    return x @ p["w"]


def check(moments, x, counted=None, tolerance=1e-5):
    """The moments are those of (batch, samples, in)."""
    counted = np.ones(x.shape[1], bool) if counted is None else np.ravel(counted)
    assert moments.samples == counted.sum()
    options = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(moments.mean_square, mean_square(x, counted), **options)
    if moments.hessian is not None:
        np.testing.assert_allclose(moments.hessian, hessian(x, counted), **options)
        np.testing.assert_array_equal(
            moments.hessian, np.swapaxes(moments.hessian, 1, 2)
        )


def test_moments_are_those_of_all_batches_together():
    found = jp.calibrate(run_chain, PARAMS, BATCHES, hessian=True)
    inputs, _ = chain_by_hand(PARAMS, BATCHES)
    assert list(found) == ["layer_0/kernel", "layer_1/kernel"]
    for name, x in zip(found, inputs, strict=True):
        check(found[name], x[None], tolerance=2e-5)
        assert found[name].mean_square.dtype == np.float32
        assert found[name].hessian.dtype == np.float32


def test_the_hessian_is_made_only_on_request():
    found = jp.calibrate(run_chain, PARAMS, BATCHES)
    inputs, _ = chain_by_hand(PARAMS, BATCHES)
    for name, x in zip(found, inputs, strict=True):
        assert found[name].hessian is None
        check(found[name], x[None], tolerance=2e-5)


def test_the_diagonal_of_the_hessian_is_the_mean_square():
    found = jp.calibrate(run_chain, PARAMS, BATCHES, hessian=True)
    for own in found.values():
        diagonal = np.einsum("bii->bi", np.asarray(own.hessian))
        np.testing.assert_allclose(diagonal, own.mean_square, rtol=1e-5)


def test_a_hessian_wider_than_a_block_is_whole():
    x = draw(1, 9, 530)
    found = jp.calibrate(product, {"w": draw(2, 530, 1)}, [x[:4], x[4:8]], hessian=True)
    check(found["w"], x[None, :8])


def test_batches_of_different_shapes_count_by_their_samples():
    batches = [BATCHES[0], BATCHES[1][:5], BATCHES[2][:1], BATCHES[0][::-1]]
    found = jp.calibrate(run_chain, PARAMS, batches, hessian=True)
    inputs, _ = chain_by_hand(PARAMS, batches)
    for name, x in zip(found, inputs, strict=True):
        assert x.shape[0] == 30
        check(found[name], x[None], tolerance=2e-5)


def test_weights_of_one_input_share_one_hessian():
    params = {name: draw(i, 4, 4) for i, name in enumerate(["q", "k", "v"])}

    def fn(p, x):
        return x @ p["q"], x.astype(jnp.float32) @ p["k"], x @ p["v"]

    found = jp.calibrate(fn, params, [draw(1, 5, 4)], hessian=True)
    assert found["q"].hessian is found["k"].hessian is found["v"].hessian


def test_each_expert_has_moments_of_its_own():
    x = draw(1, 3, 7, 4)
    found = jp.calibrate(
        lambda p, x: jnp.einsum("end,edf->enf", x, p["w"]),
        {"w": draw(2, 3, 4, 5)},
        [x[:, :3], x[:, 3:]],
        hessian=True,
    )
    assert found["w"].hessian.shape == (3, 4, 4)
    check(found["w"], x)


def test_a_weight_used_twice_has_the_moments_of_both_inputs():
    w, x = draw(3, 4, 4), draw(4, 6, 4)
    found = jp.calibrate(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, [x], hessian=True
    )
    both = np.concatenate([x, np.tanh(x.astype(np.float64) @ w)])
    assert list(found) == ["w"]
    check(found["w"], both[None])


# Which positions count.


def tokens_fn(p, batch):
    x = p["table"][batch["tokens"]]  # (batch, time, width)
    return jnp.tanh(x @ p["w"]) @ p["v"]


def test_only_the_positions_that_count_are_counted():
    params = {"table": draw(0, 9, 4), "w": W, "v": draw(1, 4, 2)}
    rng = np.random.default_rng(0)
    batches = [
        {"tokens": rng.integers(0, 9, (2, 5)), "real": rng.random((2, 5)) > 0.4}
        for _ in range(3)
    ]
    found = jp.calibrate(
        tokens_fn,
        params,
        batches,
        hessian=True,
        positions=lambda batch: batch["real"],
        prunable=lambda name, leaf: name in "wv",
    )
    real = np.concatenate([b["real"].ravel() for b in batches])
    x = np.concatenate([params["table"][b["tokens"]].reshape(-1, 4) for b in batches])
    check(found["w"], x[None], real)
    hidden = np.tanh(x.astype(np.float64) @ W)
    check(found["v"], hidden[None], real)


def test_all_positions_count_by_default_the_first_too():
    x = np.zeros((1, 3, 4), np.float32)
    x[0, 0] = 100  # a first token as large as a model's attention sink
    found = jp.calibrate(product, {"w": W}, [x])
    np.testing.assert_allclose(found["w"].mean_square, np.full((1, 4), 1e4 / 3), 1e-6)
    later = jp.calibrate(
        product,
        {"w": W},
        [x],
        positions=lambda x: np.array([[False, True, True]]),
    )
    np.testing.assert_array_equal(later["w"].mean_square, np.zeros((1, 4)))


def test_positions_hold_for_convolutions_too():
    x = draw(3, 1, 5, 4)
    real = np.array([[True, False, True, True, False]])
    found = jp.calibrate(
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        {"w": draw(4, 1, 4, 2)},
        [x],
        hessian=True,
        positions=lambda _: real,
    )
    check(found["w"], x.reshape(1, 5, 4), real)


def test_nan_where_nothing_counts_does_not_matter():
    # Padding may hold anything.
    x = np.stack([draw(1, 3, 4), np.full((3, 4), np.nan, np.float32)])
    real = np.array([[True] * 3, [False] * 3])
    found = jp.calibrate(product, {"w": W}, [x], hessian=True, positions=lambda _: real)
    check(found["w"], x[:1])


@pytest.mark.parametrize("shape", [(5,), (5, 2), (2, 4), (10,), (2, 5, 4), ()])
def test_positions_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"positions must have .* 'w'"):
        jp.calibrate(
            product,
            {"w": W},
            [draw(1, 2, 5, 4)],
            positions=lambda _: np.ones(shape, bool),
        )


def test_some_position_must_count():
    with pytest.raises(ValueError, match="some position must count"):
        jp.calibrate(
            product, {"w": W}, [draw(1, 2, 4)], positions=lambda _: np.zeros(2, bool)
        )


# Numbers.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    # 300^2 is over the largest float16; 2^12 equal terms stop growing in bfloat16.
    x = np.full((4096, 2), 300, dtype)
    found = jp.calibrate(product, {"w": np.ones((2, 2), dtype)}, [x], hessian=True)
    # 4096 equal terms, one after the other, round 1e-4 away in float32.
    np.testing.assert_allclose(found["w"].mean_square, np.full((1, 2), 9e4), 1e-4)
    np.testing.assert_allclose(found["w"].hessian, np.full((1, 2, 2), 9e4), 1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_input_that_is_not_finite_is_named(bad):
    x = draw(1, 5, 6)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="'layer_0/kernel' must be finite"):
        jp.calibrate(run_chain, PARAMS, [BATCHES[0][:5], x])


def test_the_layer_that_overflows_is_named():
    params = chain([6, 6, 6])
    params["layer_1"]["kernel"] = np.full((6, 6), np.inf, np.float32)

    def fn(p, x):
        x = x @ p["layer_0"]["kernel"]
        x = x @ p["layer_1"]["kernel"]
        return x @ p["last"]

    params["last"] = draw(1, 6, 6)
    with pytest.raises(ValueError, match="'last' must be finite"):
        jp.calibrate(fn, params, [BATCHES[0]])


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        jp.calibrate(run_chain, PARAMS, [])


def test_no_product_of_a_prunable_leaf_is_an_error_that_says_what_was_seen():
    with pytest.raises(ValueError, match="layer_0/kernel"):
        jp.calibrate(run_chain, PARAMS, BATCHES, prunable=lambda name, leaf: False)
    with pytest.raises(ValueError, match="is an operand of sin"):
        jp.calibrate(lambda p, x: x @ jnp.sin(p["w"]), {"w": W}, [draw(1, 5, 4)])


def test_a_rule_that_excludes_what_is_not_there_is_refused():
    rule = jp.tree.excluding("layer_9/*")
    with pytest.raises(
        ValueError, match=r"excluding\('layer_9/\*'\) must match a leaf"
    ):
        jp.calibrate(run_chain, PARAMS, BATCHES, prunable=rule)


def test_only_leaves_of_interest_are_looked_at():
    found = jp.calibrate(
        run_chain, PARAMS, BATCHES, prunable=lambda name, leaf: "1" in name
    )
    assert list(found) == ["layer_1/kernel"]


@pytest.mark.full
def test_one_batch_is_in_memory_at_a_time():
    made, most = [], 0

    def stream():
        nonlocal most
        for i in range(4):
            x = jnp.asarray(correlated(i, 12, 6))
            made.append(weakref.ref(x))
            gc.collect()
            most = max(most, sum(one() is not None for one in made))
            yield x
            del x

    found = jp.calibrate(run_chain, PARAMS, stream())
    assert found["layer_0/kernel"].samples == 48
    # The one at hand and, at most, the one before it.
    assert most <= 2


def test_the_parameters_are_left_as_they_are():
    params = jax.tree.map(jnp.array, PARAMS)
    before = jax.tree.map(np.array, params)
    jp.calibrate(run_chain, params, BATCHES, hessian=True)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_positions_do_not_say_which_rows_of_an_expert_count():
    def routed(params, x):
        chosen = (x[:, 0] > 0).astype(jnp.int32)
        sizes = jnp.bincount(chosen, length=2)
        return jax.lax.ragged_dot(x[jnp.argsort(chosen)], params["e"], sizes)

    params, x = {"e": draw(0, 2, 8, 4)}, draw(1, 32, 8)
    assert jp.calibrate(routed, params, [x])["e"].reached.sum() == 32
    with pytest.raises(ValueError, match="group by group"):
        jp.calibrate(routed, params, [x], positions=lambda _: np.arange(32) < 10)


def test_a_batch_may_hold_a_key():
    def dropped(params, batch):
        kept = jax.random.bernoulli(batch["key"], 0.9, batch["x"].shape)
        return jnp.where(kept, batch["x"], 0) @ params["w"]

    batches = [{"x": draw(i, 20, 8), "key": jax.random.key(i)} for i in range(2)]
    found = jp.prune_trained(
        dropped, {"w": draw(3, 8, 4)}, batches, method="wanda", sparsity=0.5
    )
    assert int((found.params["w"] == 0).sum()) == 16
