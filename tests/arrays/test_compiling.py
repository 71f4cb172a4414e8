"""Options of `jax.jit` for programs over many leaves."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune.arrays import compiling


@pytest.fixture
def anew():
    """No answer is kept from before, nor for later tests."""
    compiling.leaf_by_leaf.cache_clear()
    yield
    compiling.leaf_by_leaf.cache_clear()


def test_a_step_of_many_leaves_takes_less_than_a_copy_of_them_beside(anew):
    leaves, side = 40, 128
    params = {str(i): jnp.ones((side, side)) for i in range(leaves)}
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3),
        optax.scale_by_param_block_rms(),
    )
    tx = jp.keep_masks(optimizer, masks)

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1), compiler_options=compiling.leaf_by_leaf())
        .lower(params, tx.init(params), params)
        .compile()
    )
    # Masked gradients wait for their norm; all else comes and goes with its leaf.
    size = 4 * leaves * side * side
    assert compiled.memory_analysis().temp_size_in_bytes < 1.6 * size


def test_an_option_that_xla_does_not_know_is_left_out(anew, monkeypatch):
    monkeypatch.setattr(compiling, "_OPTIONS", {"xla_cpu_no_such_option": False})
    assert compiling.leaf_by_leaf() == {}


def test_other_backends_get_none(anew, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiling.leaf_by_leaf() == {}
