"""The table of primitives is the only place that a new one is added to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive as JaxPrimitive
from jax.interpreters import mlir

import jaxprune as jp
from jaxprune.graph import primitives
from jaxprune.graph.axis_arithmetic import freeze_all_axes, unary
from jaxprune.graph.primitives import PRIMITIVES, Primitive, rules_of
from jaxprune.graph.view_rules import cast_view

PARAMS = {
    "up": jnp.arange(12.0).reshape(2, 6),
    "down": jnp.arange(18.0).reshape(6, 3),
}
X = jnp.arange(10.0).reshape(5, 2)


@pytest.fixture
def double():
    """A primitive of two times its operand, which the table does not have."""
    primitive = JaxPrimitive("double")
    primitive.def_impl(lambda x: 2 * x)
    primitive.def_abstract_eval(lambda x: x)
    lowering = mlir.lower_fun(lambda x: 2 * x, multiple_results=False)
    mlir.register_lowering(primitive, lowering)
    return primitive.bind


def test_every_row_says_what_its_primitive_does_to_axes():
    silent = [name for name, row in PRIMITIVES.items() if row.dims is freeze_all_axes]
    assert not silent


def test_a_primitive_without_a_row_freezes_hides_and_keeps_its_sizes(double):
    assert rules_of("double") == Primitive()

    def fn(params, x):
        return double(x @ double(params["up"])) @ params["down"]

    reasons = {group.name: group.why for group in jp.axis_groups(fn, PARAMS, X)}
    assert "double, which is not understood" in reasons["down:0"]
    traced = jp.trace(fn, PARAMS, X)
    assert traced.unseen == {"up": "is an operand of double, dot_general"}


def test_a_row_is_all_that_a_new_primitive_needs(double, monkeypatch):
    monkeypatch.setitem(primitives.PRIMITIVES, "double", Primitive(unary()))

    def fn(params, x):
        return double(jax.nn.relu(x @ params["up"])) @ params["down"]

    small = jp.shrink(fn, PARAMS, [X], jp.scores.magnitude, 0.5)
    units = small.report["kept"]["down:0"]
    mask = np.isin(np.arange(6), units)
    zeroed = {"up": PARAMS["up"] * mask[None], "down": PARAMS["down"] * mask[:, None]}
    np.testing.assert_allclose(small.fn(small.params, X), fn(zeroed, X))


def test_a_view_rule_makes_a_weight_seen(double, monkeypatch):
    def fn(params, x):
        return x @ double(params["up"])

    assert not jp.trace(fn, {"up": PARAMS["up"]}, X).linear_ops
    monkeypatch.setitem(primitives.PRIMITIVES, "double", Primitive(unary(), cast_view))
    (op,) = jp.trace(fn, {"up": PARAMS["up"]}, X).linear_ops
    assert (op.name, op.view.cast) == ("up", True)
