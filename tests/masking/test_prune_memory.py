"""Pruning in place takes the parameters' own memory, and one leaf more at most."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.jax_api

ALLOCATIONS = ["layer", "global"]
LEAF = (256, 128)


def network(leaves):
    drawn = np.random.default_rng(0).normal(size=(leaves, *LEAF)).astype(np.float32)
    params = {f"layer_{i:02d}": jnp.asarray(leaf) for i, leaf in enumerate(drawn)}
    params["norm"] = jnp.asarray(np.ones(128, np.float32))
    return params


@pytest.mark.parametrize(
    ("kind", "allocation"),
    [
        (None, "layer"),
        pytest.param(AxisType.Auto, "global", marks=pytest.mark.full),
        pytest.param(None, "global", marks=pytest.mark.full),
        pytest.param(AxisType.Explicit, "layer", marks=pytest.mark.full),
        pytest.param(AxisType.Auto, "layer", marks=pytest.mark.full),
        pytest.param(AxisType.Explicit, "global", marks=pytest.mark.full),
    ],
)
def test_donated_parameters_are_gone_and_the_result_is_the_same(allocation, kind):
    params = network(2)
    if kind is not None:
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        spread = NamedSharding(mesh, P("x", "y"))
        params = {
            k: jax.device_put(v, spread) if v.ndim == 2 else v
            for k, v in params.items()
        }
    scores = jp.scores.magnitude(params)
    expected = jax.device_get(jp.prune(params, scores, 0.6, allocation=allocation))
    shardings = {k: v.sharding for k, v in params.items()}
    pruned = jp.prune(params, scores, 0.6, allocation=allocation, donate=True)
    assert pruned["norm"] is params["norm"]
    assert not params["norm"].is_deleted()
    assert all(leaf.is_deleted() for k, leaf in params.items() if k != "norm")
    for name, leaf in pruned.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[name])
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_buffers_are_used_again(allocation):
    params = network(2)
    scores = jp.scores.magnitude(params)
    where = {k: v.unsafe_buffer_pointer() for k, v in params.items()}
    pruned = jp.prune(params, scores, 0.6, allocation=allocation, donate=True)
    assert {k: v.unsafe_buffer_pointer() for k, v in pruned.items()} == where


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_compiled_with_donation_it_needs_one_leaf_more_at_most(allocation):
    params = network(leaves=4)
    scores = jp.scores.magnitude(params)
    prune = functools.partial(jp.prune, sparsity=0.6, allocation=allocation)
    compiled = jax.jit(prune, donate_argnums=0).lower(params, scores).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * 4 * 256 * 128
    assert memory.temp_size_in_bytes <= 4 * 256 * 128


def test_nothing_is_donated_where_anything_is_refused():
    params = network(2)
    scores = jp.scores.magnitude(params)
    bad = scores | {"layer_01": scores["layer_01"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="layer_01"):
        jp.prune(params, bad, 0.5, donate=True)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        jp.prune(params, scores, 1.5, donate=True)
    with pytest.raises(ValueError, match="divisible"):
        jp.prune(params, scores, pattern=jp.patterns.NM(3, 7), donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_leaf_that_is_used_twice_is_not_donated():
    params = network(2)
    tied = params | {"layer_01": params["layer_00"]}
    scores = jp.scores.magnitude(tied)
    with pytest.raises(ValueError, match="nothing else uses"):
        jp.prune(tied, scores, 0.5, donate=True)
    masked = {"norm": optax.MaskedNode()}
    with pytest.raises(ValueError, match="nothing else uses"):
        jp.prune(params, {**params, **masked}, 0.5, donate=True)
    jp.prune(params, jp.scores.magnitude(params), 0.5, donate=True)
    with pytest.raises(ValueError, match="deleted"):
        jp.prune(params, scores, 0.5, donate=True)
