"""Functions that JAX takes and that are traced in an unusual way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.graph.linear_ops import trace
from tests.support import removal
from tests.support.small_models import draw

pytestmark = pytest.mark.jax_api

WEIGHTS = {"w": draw(0, 4, 6), "k": draw(1, 6), "o": draw(2, 6, 3)}
X = draw(3, 20, 4)


def test_a_function_is_traced_anew_each_time():
    """JAX keeps the trace of a function, with what it closed over at that time."""
    held = {"scale": np.array([1.0, 1, 1, 0, 0, 0], np.float32)}

    def fn(params, x):
        return (jnp.tanh(x @ params["w"]) * held["scale"][None]) @ params["o"]

    for scale in (held["scale"], 1 - held["scale"]):
        held["scale"] = scale
        small = jp.shrink(fn, WEIGHTS, [X], "sparsegpt", 0.5)
        np.testing.assert_array_equal(
            small.params["w"], np.asarray(WEIGHTS["w"])[:, scale > 0]
        )


def test_the_error_of_a_loop_over_python_numbers_says_what_to_call():
    def fn(params, x, array=lambda i: i):
        def body(i, h):
            return jnp.tanh(h @ params["w"]) * array(i).astype(h.dtype)

        return jax.lax.fori_loop(0, 2, body, x)

    params, x = {"w": draw(0, 4, 4)}, draw(1, 2, 4)
    with pytest.raises(ValueError, match=r"'astype'.*; call jnp\.asarray on them"):
        jp.trace(fn, params, x)
    found = jp.trace(functools.partial(fn, array=jnp.asarray), params, x)
    assert {op.leaf for op in found.linear_ops} == {"w"}


def test_an_error_of_the_function_itself_stays_as_it_is():
    with pytest.raises(TypeError, match="of my own"):
        jp.trace(lambda params, x: (_ for _ in ()).throw(TypeError("of my own")), {}, X)


def test_a_long_computation_of_parameters_alone():
    def fn(params, x):
        def step(carry, _):
            return jnp.tanh(carry * 1.01) + 0.1, None

        scale, _ = jax.lax.scan(step, params["k"], None, length=600)
        return (jnp.tanh(x @ params["w"]) * scale[None]) @ params["o"]

    small = jp.shrink(fn, WEIGHTS, [X], "sparsegpt", 0.5)
    assert small.params["w"].shape == (4, 3)


def test_convolutions_under_vmap():
    """JAX batches them by a reshape that transposes first."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fn(params, x):
        def one(kernel, head):
            return jnp.tanh(conv(x, kernel)).mean((1, 2)) @ head

        return jax.vmap(one)(params["kernel"], params["head"]).sum(0)

    params = {"kernel": draw(0, 2, 3, 3, 2, 6), "head": draw(1, 2, 6, 3)}
    x = draw(2, 2, 5, 5, 2)
    assert not jp.trace(fn, params, x).unseen
    groups = jp.axis_groups(fn, params, x)
    (name,) = [group.name for group in groups if group.units == 6]
    removal.check(fn, params, x, {name: 0.5}, groups=groups)


def test_an_empty_leaf_may_be_reshaped():
    def fn(params, x):
        return x @ params["w"] + params["empty"].reshape(-1).sum()

    found = jp.trace(fn, {"w": draw(0, 4, 3), "empty": jnp.zeros((3, 0))}, X)
    assert {op.leaf for op in found.linear_ops} == {"w"}


def test_a_composite_is_the_function_that_it_names():
    def fn(params, x):
        return jax.lax.composite(jnp.tanh, "my.tanh")(x @ params["w"]) @ params["o"]

    params = {name: WEIGHTS[name] for name in "wo"}
    removal.check(fn, params, X, {"o:0": 0.5})


def test_what_is_no_array_is_no_parameter():
    def fn(params, x):
        return x @ params["w"]

    for arguments in ((WEIGHTS, fn, X), (fn, {**WEIGHTS, "act": jnp.tanh}, X)):
        with pytest.raises(
            TypeError, match=r"parameters must be arrays, but '(act)?' "
        ):
            jp.trace(*arguments)


def test_numbers_that_print_alike_are_two():
    near = np.float32(0.001234567), np.float32(0.0012345699)

    def fn(params, x):
        h = x @ params["w"]
        return (h * near[0] - h * near[1]) @ params["o"]

    steps = trace(fn, WEIGHTS, X).program.steps
    (step,) = [step for step in steps if step.primitive.name == "sub"]
    assert step.inputs[0] != step.inputs[1]


@pytest.mark.parametrize("shift", [1, 3])
def test_an_axis_beside_its_shifted_copy_is_left_alone_however_long(shift):
    def fn(params, x):
        hidden = jnp.tanh(x @ params["w"])
        smooth = params["p"][shift:] - params["p"][:-shift]
        return (hidden * params["k"][None]) @ params["o"] + jnp.square(smooth).sum()

    params = {**WEIGHTS, "p": jnp.ones((2048, 5))}
    free = [g.name for g in jp.axis_groups(fn, params, X).groups if g.removable]
    assert "k:0" in free
    assert not any(name.startswith("p:0") for name in free)
