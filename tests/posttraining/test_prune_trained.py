"""Each weight is pruned for the input that it will see: as worked out by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining.solvers import sparsegpt
from tests.support import oracles
from tests.support.oracles_trained import wanda
from tests.support.small_models import (
    chain,
    chain_by_hand,
    correlated,
    draw,
    hessian,
    keep_per_output,
    kernels_of,
    prune,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

WIDTHS = [6, 6, 6, 6]  # equal shapes compile once
PARAMS = chain(WIDTHS)
BATCHES = [correlated(i, 24, 6) / 3 for i in range(2)]


def masked(kernel, mask):
    return np.where(mask, kernel, 0)


def product(p, x):
    return x @ p["w"]


def rows_of(report):
    """The report's rows without times."""
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in report["weights"]
    ]


# Layer by layer.


def by_magnitude(i, kernel, inputs):
    removed = oracles.removed_count(0.5, kernel.size)
    return masked(kernel, oracles.keep_top(np.abs(kernel), removed))


def by_wanda(i, kernel, inputs):
    removed = oracles.removed_count(0.6, kernel.size)
    return masked(kernel, keep_per_output(wanda(kernel, inputs), removed))


def by_ria(i, kernel, inputs):
    size = np.abs(kernel)
    relative = size / size.sum(0, keepdims=True) + size / size.sum(1, keepdims=True)
    scores = relative * (np.square(inputs).sum(0) ** 0.25)[:, None]
    return masked(kernel, oracles.keep_top(scores, round(0.5 * kernel.size)))


@pytest.mark.parametrize(
    ("method", "sparsity", "rule"),
    [
        ("wanda", 0.6, by_wanda),
        pytest.param("magnitude", 0.5, by_magnitude, marks=pytest.mark.full),
        pytest.param("ria", 0.5, by_ria, marks=pytest.mark.full),
    ],
)
def test_masks_are_those_worked_out_by_hand(method, sparsity, rule):
    pruned, _ = prune(run_chain, PARAMS, BATCHES, method, sparsity)
    _, expected = chain_by_hand(PARAMS, BATCHES, rule)
    for got, kernel in zip(kernels_of(pruned), expected, strict=True):
        # What stays keeps its bits, so masks and weights are equal exactly.
        np.testing.assert_array_equal(got, kernel.astype(np.float32))


@pytest.mark.full
def test_reconstructed_weights_are_those_worked_out_by_hand():
    def rule(i, kernel, inputs):
        own = jnp.asarray(hessian(inputs[None])[0], jnp.float32)
        return sparsegpt.solve(
            jnp.asarray(kernel, jnp.float32), own, kernel.size - 18
        ).weight

    pruned, _ = prune(run_chain, PARAMS, BATCHES, "sparsegpt")
    _, expected = chain_by_hand(PARAMS, BATCHES, rule)
    for got, kernel in zip(kernels_of(pruned), expected, strict=True):
        np.testing.assert_array_equal(got == 0, kernel == 0)
        # Rounding of the Hessian is multiplied by its condition.
        np.testing.assert_allclose(got, kernel, rtol=2e-3, atol=2e-4)


def test_later_weights_are_chosen_for_what_is_left_of_earlier_ones():
    # By the dense inputs the masks would be others.
    def alone(i, kernel, inputs):
        return by_wanda(i, kernel, dense[i])

    dense, _ = chain_by_hand(PARAMS, BATCHES)
    _, wrong = chain_by_hand(PARAMS, BATCHES, alone)
    pruned, _ = prune(run_chain, PARAMS, BATCHES, "wanda", 0.6)
    got = kernels_of(pruned)
    assert np.array_equal(got[0], wrong[0].astype(np.float32))
    assert any(
        (a == 0).tolist() != (b == 0).tolist() for a, b in zip(got, wrong, strict=True)
    )


def test_weights_of_one_input_are_pruned_together_and_the_next_sees_them_pruned():
    params = {name: draw(i, 6, 6) for i, name in enumerate(["q", "k", "v", "out"])}

    def fn(p, x):
        return (jnp.tanh(x @ p["q"]) * (x @ p["k"]) + x @ p["v"]) @ p["out"]

    x = draw(9, 30, 6)
    pruned, report = prune(fn, params, [x], "wanda")

    def rule(kernel, inputs):
        mask = keep_per_output(wanda(kernel, inputs), kernel.size // 2)
        return masked(kernel, mask)

    q, k, v = (rule(params[n].astype(np.float64), x) for n in "qkv")
    mixed = np.tanh(x @ q) * (x @ k) + x @ v
    expected = dict(q=q, k=k, v=v, out=rule(params["out"].astype(np.float64), mixed))
    for name, kernel in expected.items():
        np.testing.assert_array_equal(pruned[name], kernel.astype(np.float32))
    assert [row["name"] for row in report["weights"]] == ["q", "k", "v", "out"]


def test_a_weight_used_twice_is_pruned_once_for_both_of_its_inputs():
    w, v = draw(3, 6, 6), draw(5, 6, 6)
    x = draw(4, 40, 6) * np.array([[3, 0.1, 1, 1, 0.2, 2]], np.float32)

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]

    pruned, report = prune(fn, {"w": w, "v": v}, [x], "wanda")
    second = np.tanh(x.astype(np.float64) @ w)
    both = np.concatenate([x, second])
    mask = keep_per_output(wanda(w, both), 18)
    np.testing.assert_array_equal(pruned["w"], masked(w, mask))
    assert [row["name"] for row in report["weights"]] == ["w", "v"]


def test_a_weight_used_twice_on_one_input_is_seen_once_for_each():
    w, x = draw(3, 6, 6), draw(4, 40, 6)

    def fn(p, x):
        return x @ p["w"] + jnp.dot(x, p["w"], precision="highest")

    twice, _ = prune(fn, {"w": w}, [x], "wanda")
    once, _ = prune(lambda p, x: x @ p["w"], {"w": w}, [x], "wanda")
    np.testing.assert_array_equal(twice["w"], once["w"])


def test_stacked_layers_are_pruned_one_by_one_for_what_they_see():
    stack = draw(7, 3, 6, 6)

    def fn(p, x):
        return jax.lax.scan(
            jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"]
        )[0]

    pruned, report = prune(fn, {"w": jnp.asarray(stack)}, BATCHES, "wanda", 0.6)
    x = np.concatenate(BATCHES).astype(np.float64)
    found = np.asarray(pruned["w"])
    for i, w in enumerate(stack.astype(np.float64)):
        kernel = by_wanda(i, w, x)
        np.testing.assert_array_equal(found[i], kernel.astype(np.float32))
        x = np.tanh(x @ kernel)
    assert [row["name"] for row in report["weights"]] == ["w/0", "w/1", "w/2"]


def test_parts_of_a_fused_leaf_are_pruned_by_themselves():
    kernel = draw(8, 6, 18)

    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return (x @ q) * (x @ k) + x @ v

    pruned, _ = prune(fn, {"qkv": kernel}, BATCHES, "magnitude")
    expected = [by_magnitude(0, part, None) for part in np.split(kernel, 3, 1)]
    np.testing.assert_array_equal(pruned["qkv"], np.concatenate(expected, 1))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_heads_of_a_fused_leaf_are_pruned_as_if_apart(method):
    kernel = draw(8, 6, 3, 2, 4)  # queries, keys and values of two heads

    def attention(queries, keys, values, x):
        parts = [jnp.einsum("bc,chd->bhd", x, w) for w in (queries, keys, values)]
        return jax.nn.dot_product_attention(*(part[None] for part in parts))[0]

    def fused(p, x):
        return attention(*jnp.moveaxis(p["qkv"].reshape(6, 3, 2, 4), 1, 0), x)

    pruned, _ = prune(fused, {"qkv": kernel.reshape(6, 24)}, BATCHES, method)
    parts = {name: kernel[:, i] for i, name in enumerate("qkv")}
    expected, _ = prune(
        lambda p, x: attention(p["q"], p["k"], p["v"], x), parts, BATCHES, method
    )
    for i, name in enumerate("qkv"):
        part = np.reshape(pruned["qkv"], kernel.shape)[:, i]
        np.testing.assert_allclose(part, expected[name], rtol=1e-6)


def test_an_equinox_weight_is_pruned_along_its_inputs():
    weight = draw(9, 6, 6)  # (out, in)
    pruned, _ = prune(lambda p, x: x @ p["w"].T, {"w": weight}, BATCHES, "wanda", 0.6)
    expected = by_wanda(0, weight.T.astype(np.float64), np.concatenate(BATCHES)).T
    np.testing.assert_array_equal(pruned["w"], expected.astype(np.float32))


def test_experts_are_pruned_for_what_each_of_them_sees():
    weight = draw(1, 3, 6, 4)
    scale = np.array([1, 30, 0.2, 5, 1, 2], np.float32)
    scales = np.stack([scale, scale[::-1], np.roll(scale, 2)])[:, None]
    x = draw(2, 3, 20, 6) * scales
    pruned, report = prune(
        lambda p, x: jnp.einsum("end,edf->enf", x, p["w"]),
        {"w": weight},
        [x],
        "wanda",
        0.3,
    )
    found = np.asarray(pruned["w"])
    zeros = [int((w == 0).sum()) for w in found]
    assert sum(zeros) == round(0.3 * weight.size)
    assert max(zeros) - min(zeros) <= 1
    for got, w, own, removed in zip(found, weight, x, zeros, strict=True):
        mask = keep_per_output(wanda(w, own), removed)
        np.testing.assert_array_equal(got, masked(w, mask))
    assert report["weights"][0]["shape"] == [3, 6, 4]


def test_a_convolution_is_pruned_by_its_patches():
    kernel, x = draw(3, 3, 2, 4), draw(4, 2, 9, 2)  # (window, in, out)
    x = x * np.array([1, 5], np.float32)

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
        )

    pruned, _ = prune(fn, {"w": kernel}, [x], "wanda")
    patches = np.stack([x[:, i : i + 7] for i in range(3)], 2)  # (2, 7, window, in)
    norms = np.sqrt(np.square(patches).mean((0, 1)))
    scores = np.abs(kernel) * norms[..., None]
    # Of each output half of the window's inputs go; no two scores tie.
    kept = scores > np.sort(scores.reshape(6, 4), 0)[2]
    np.testing.assert_array_equal(pruned["w"], masked(kernel, kept))


def test_only_the_positions_that_count_decide():
    w = draw(5, 6, 6)
    x = draw(6, 2, 8, 6)
    real = np.arange(8)[None] >= np.array([2, 5])[:, None]
    x[~real] *= np.array([100, 0, 50, 1, 9, 3], np.float32)
    pruned, report = prune(
        product, {"w": w}, [x], "wanda", positions=lambda _: jnp.asarray(real)
    )
    mask = keep_per_output(wanda(w, x[real]), 18)
    np.testing.assert_array_equal(pruned["w"], masked(w, mask))
    assert report["positions"] != "all"
    assert report["samples"] == real.sum()
    everywhere, report = prune(product, {"w": w}, [x], "wanda")
    mask = keep_per_output(wanda(w, x.reshape(-1, 6)), 18)
    np.testing.assert_array_equal(everywhere["w"], masked(w, mask))
    assert report["positions"] == "all"


# What the result is made of.


def test_what_is_not_pruned_is_the_same_object():
    params = {**PARAMS, "steps": jnp.arange(3), "idle": jnp.ones((2, 2))}

    def fn(p, x):
        return run_chain({k: v for k, v in p.items() if "layer" in k}, x)

    pruned, report = prune(fn, params, BATCHES, prunable=jp.tree.excluding("layer_1/*"))
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    before, after = jp.tree.named_leaves(params), jp.tree.named_leaves(pruned)
    changed = {name for name, leaf in before.items() if after[name] is not leaf}
    assert changed == {"layer_0/kernel", "layer_2/kernel"}
    assert "idle" in report["unseen"]


def test_the_parameters_that_were_given_stay_as_they_are():
    stack = jnp.asarray(draw(7, 3, 6, 6))
    params = {"w": stack, "v": jnp.asarray(draw(8, 6, 6))}
    before = jax.tree.map(np.array, params)

    def fn(p, x):
        for w in (p["w"][0], p["w"][1], p["w"][2]):
            x = jnp.tanh(x @ w)
        return x @ p["v"]

    prune(fn, params, BATCHES, "wanda")
    assert same_bits(jax.tree.map(np.array, params), before)


def test_parameters_that_are_given_up_are_gone_and_the_result_is_the_same():
    params = jax.tree.map(jnp.array, PARAMS)
    expected, _ = prune(run_chain, PARAMS, BATCHES, "wanda")
    pruned, _ = prune(run_chain, params, BATCHES, "wanda", donate=True)
    assert same_bits(pruned, expected)
    for old, new in zip(params.values(), pruned.values(), strict=True):
        assert old["kernel"].is_deleted()
        assert new["bias"] is old["bias"]


@pytest.mark.full
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)]
)
def test_half_precision_leaves_stay_what_they_are(dtype):
    params = chain([6, 6, 6], dtype=dtype)
    batches = [x.astype(dtype) for x in BATCHES]
    for method in ("wanda", "sparsegpt")[: 1 + (dtype == jnp.bfloat16)]:
        pruned, report = prune(run_chain, params, batches, method)
        for old, new in zip(kernels_of(params), kernels_of(pruned), strict=True):
            assert new.dtype == old.dtype
            assert (new == 0).sum() == old.size // 2
            if method == "wanda":
                assert np.array_equal(new[new != 0], old[new != 0])
        assert report["achieved"] == 0.5


def test_numpy_leaves_in_lists_tuples_and_none_are_fine():
    first, second = draw(1, 6, 6), draw(2, 6, 6)
    params = ([first, None], (second,))

    def fn(p, x):
        return jnp.tanh(x @ p[0][0]) @ p[1][0]

    pruned, _ = prune(fn, params, BATCHES)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    np.testing.assert_array_equal(pruned[0][0], by_magnitude(0, first, None))
    np.testing.assert_array_equal(pruned[1][0], by_magnitude(1, second, None))


# The report.


def test_the_report_is_json_and_says_what_was_done():
    pruned, report = prune(run_chain, PARAMS, BATCHES, "sparsegpt")
    assert json.loads(json.dumps(report)) == report
    assert "SparseGPT" in report["method"]
    assert "Unstructured" in report["pattern"]
    assert report["sparsity"] == 0.5
    assert report["achieved"] == 0.5
    assert report["batches"] == 2
    assert report["samples"] == 48
    assert report["seconds"] > 0
    assert report["calibration"]
    for row, kernel in zip(report["weights"], kernels_of(pruned), strict=True):
        assert row["shape"] == [1, *kernel.shape]
        assert row["removed"] == row["zeros"] == (kernel == 0).sum()
        assert row["size"] == kernel.size
        np.testing.assert_allclose(row["damping"], 0.01, rtol=1e-5)
        assert row["seconds"] >= 0


@pytest.mark.parametrize("share", [np.float32(0.5), {"*": np.float32(0.5)}])
def test_the_report_is_json_where_the_sparsity_is_numpys(share):
    _, report = prune(run_chain, PARAMS, BATCHES, "magnitude", sparsity=share)
    assert json.loads(json.dumps(report))["sparsity"] in (0.5, {"*": 0.5})


def test_the_error_in_the_report_is_that_of_the_outputs_on_the_first_batch():
    _, report = prune(run_chain, PARAMS, BATCHES, "wanda", 0.6)
    inputs, after = chain_by_hand(PARAMS, BATCHES, by_wanda)
    for row, x, old, new in zip(
        report["weights"], inputs, kernels_of(PARAMS), after, strict=True
    ):
        x = x[: len(BATCHES[0])]
        error = np.square(x @ (old - new)).sum() / np.square(x @ old).sum()
        np.testing.assert_allclose(row["error"], error, rtol=1e-3)


def test_the_same_call_gives_the_same_bits_and_the_same_rows():
    runs = [prune(run_chain, PARAMS, BATCHES, "sparsegpt") for _ in range(2)]
    assert same_bits(runs[0].params, runs[1].params)
    assert rows_of(runs[0].report) == rows_of(runs[1].report)
