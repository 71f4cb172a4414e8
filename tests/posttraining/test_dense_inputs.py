"""Inputs of the dense layer: all of a layer is seen before any of it is pruned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.graph import segments
from jaxprune.graph.linear_ops import trace
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.solvers import sparsegpt
from tests.support import oracles
from tests.support.oracles_trained import wanda
from tests.support.small_models import correlated, draw, hessian, keep_per_output
from tests.support.small_models import quick_compilation as quick_compilation

BATCHES = [correlated(i, 24, 6) / 3 for i in range(2)]
LAYERS = 3
PARAMS = {
    **{f"up_{i}": draw(i, 6, 6) / 2 for i in range(LAYERS)},
    **{f"down_{i}": draw(9 + i, 6, 6) / 2 for i in range(LAYERS)},
    "out": draw(20, 6, 6),
}


def run(params, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"up_{i}"]) @ params[f"down_{i}"]
    return x @ params["out"]


@functools.cache
def by_hand(rule, inputs):
    """The pruned weights, in float64; `rule(kernel, rows)` prunes one."""
    dense = {name: kernel.astype(np.float64) for name, kernel in PARAMS.items()}
    x, found = np.concatenate(BATCHES).astype(np.float64), {}
    for i in range(LAYERS):
        up, down = dense[f"up_{i}"], dense[f"down_{i}"]
        found[f"up_{i}"] = rule(up, x)
        seen = up if inputs == "dense" else found[f"up_{i}"]
        found[f"down_{i}"] = rule(down, np.tanh(x @ seen))
        x = x + np.tanh(x @ found[f"up_{i}"]) @ found[f"down_{i}"]
    return found | {"out": rule(dense["out"], x)}


def by_wanda(kernel, rows):
    removed = oracles.removed_count(0.6, kernel.size)
    return np.where(keep_per_output(wanda(kernel, rows), removed), kernel, 0)


def by_sparsegpt(kernel, rows):
    own = jnp.asarray(hessian(rows[None])[0], jnp.float32)
    removed = oracles.removed_count(0.6, kernel.size)
    found = sparsegpt.solve(
        jnp.asarray(kernel, jnp.float32), own, kernel.size - removed
    )
    return np.asarray(found.weight, np.float64)


DENSE = jp.passes.wanda(inputs="dense")


def prune(method, **options):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return jp.prune_trained(
        run, params, BATCHES, method=method, sparsity=0.6, **options
    )


@pytest.mark.parametrize("inputs", ["dense", "left"])
@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (jp.passes.wanda(), by_wanda),
        pytest.param(jp.passes.sparsegpt(), by_sparsegpt, marks=pytest.mark.full),
    ],
    ids=["wanda", "sparsegpt"],
)
def test_each_weight_is_chosen_by_the_inputs_asked_for(method, rule, inputs):
    pruned = jax.device_get(prune(dataclasses.replace(method, inputs=inputs)).params)
    expected = by_hand(rule, inputs)
    other = by_hand(rule, "left" if inputs == "dense" else "dense")
    for name, kernel in expected.items():
        np.testing.assert_array_equal(pruned[name] == 0, kernel == 0, err_msg=name)
        # Rounding of the Hessian is multiplied by its condition.
        np.testing.assert_allclose(pruned[name], kernel, rtol=2e-3, atol=2e-4)
    # What is asked for makes a difference here.
    assert any(((other[k] == 0) != (expected[k] == 0)).any() for k in expected)


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [
        jp.passes.wanda(relative=True),
        jp.passes.ria(relative=True),
        jp.passes.sparsegpt(relative=True),
        jp.passes.alps(relative=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_relative_is_of_samples_that_have_one_size(method):
    x = correlated(0, 60, 16) * np.exp(2 * draw(1, 60, 1))
    x[:3] *= np.float32(1e-25)  # whose squares are nothing
    x[3:6] *= np.float32(1e25)  # and whose squares are infinite
    size = np.sqrt(np.mean(np.square(x, dtype=np.float64), 1, keepdims=True))
    params = {"w": draw(2, 16, 16)}

    def pruned(method, x):
        product = lambda params, x: x @ params["w"]  # noqa: E731
        found = jp.prune_trained(product, params, [x], method=method, sparsity=0.5)
        return np.asarray(found.params["w"])

    plain = dataclasses.replace(method, relative=False)
    expected = pruned(plain, np.float32(x / size))
    found = pruned(method, x)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert ((pruned(plain, x[6:]) == 0) != (pruned(method, x[6:]) == 0)).any()


def test_the_report_says_which_inputs_they_were():
    assert "inputs='left'" in prune("wanda").report["method"]
    assert "inputs='dense'" in prune(DENSE).report["method"]


def test_the_error_of_a_weight_is_of_the_inputs_it_was_chosen_by():
    report = prune(DENSE).report
    rows = {row["name"]: row["error"] for row in report["weights"]}
    first = np.tanh(BATCHES[0].astype(np.float64) @ PARAMS["up_0"])
    after = by_hand(by_wanda, "dense")["down_0"]
    dense = PARAMS["down_0"].astype(np.float64)
    lost = np.square(first @ (dense - after)).sum() / np.square(first @ dense).sum()
    assert rows["down_0"] == pytest.approx(lost, rel=1e-4)


def test_old_weights_can_be_given_up_on_the_way():
    expected = prune(DENSE).params
    given = prune(DENSE, donate=True).params
    for name in PARAMS:
        np.testing.assert_array_equal(given[name], expected[name])


def test_no_program_is_compiled_for_the_second_look():
    assert prune(DENSE).report["programs"] == prune("wanda").report["programs"]


def parts(fn, params, x):
    """The names of the weights of each layer, as the pipeline would take them."""
    traced = trace(fn, params, x)
    chosen = preparation.prunable_ops(traced, params, jp.tree.prunable)
    cut = segments.cut_at_inputs(traced, chosen)
    return [
        [p.name for i in own for p in cut[i].linear_ops]
        for own in segments.layer_ranges(cut)
    ]


def square(count):
    return {str(i): draw(i, 4, 4) for i in range(count)}


X = draw(50, 5, 4)


def test_layers_are_what_comes_again():
    found = parts(run, jax.tree.map(jnp.asarray, PARAMS), BATCHES[0])
    assert found == [
        ["up_0", "down_0"],
        ["up_1", "down_1"],
        ["up_2", "down_2"],
        ["out"],
    ]


def test_a_last_layer_that_hands_less_on_is_a_layer_too():
    # A gated layer: the first weight's output waits for the third's input.
    def fn(p, x):
        for i in range(0, 6, 2):
            hidden = jnp.tanh(x @ p[str(i)])
            x = x + hidden
            x = x * (jnp.sin(x) @ p[str(i + 1)]) + hidden
        return x

    assert parts(fn, square(6), X) == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_two_equal_layers_are_enough_and_what_goes_before_is_alone():
    def fn(p, x):
        x = jnp.sin(x @ p["0"])
        for i in (1, 4):
            both = jnp.tanh(x @ p[str(i)]) * (x @ p[str(i + 1)])
            x = x + both @ p[str(i + 2)]
        return x

    assert parts(fn, square(7), X) == [["0"], ["1", "2", "3"], ["4", "5", "6"]]


def test_layers_of_two_kinds_in_turn_are_one():
    def fn(p, x):
        for i in range(0, 8, 2):
            act = jnp.tanh if i % 4 else jnp.sin
            x = x + act(x @ p[str(i)]) @ p[str(i + 1)]
        return x

    assert parts(fn, square(8), X) == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]


def test_a_chain_of_equal_weights_is_taken_one_by_one():
    def fn(p, x):
        for name in p:
            x = jnp.tanh(x @ p[name])
        return x

    assert parts(fn, square(5), X) == [["0"], ["1"], ["2"], ["3"], ["4"]]


def test_where_nothing_comes_again_each_weight_is_alone():
    def fn(p, x):
        return jnp.cos(jnp.sin(jnp.tanh(x @ p["0"]) @ p["1"]) @ p["2"])

    assert parts(fn, square(3), X) == [["0"], ["1"], ["2"]]
