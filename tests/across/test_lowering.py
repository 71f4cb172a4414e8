"""Every program lowers for GPU and TPU, on a machine that has neither."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.models import generate, hf
from jaxprune.models.decoder.model import Decoder
from jaxprune.posttraining.solvers import alps, sparsegpt, units
from tests.support import tiny_hf
from tests.support.small_models import correlated, draw

PARAMS = {"up": {"kernel": draw(0, 8, 16), "bias": draw(1, 16)}, "down": draw(2, 16, 8)}
EVENTS = {1: 0.25, 2: 0.5}
TRANSFORMATIONS = {
    "keep_masks": lambda: jp.keep_masks(optax.adamw(1e-3), _masks()),
    "gradual": lambda: jp.gradual(optax.adamw(1e-3), EVENTS),
    "gradual, packed": lambda: jp.gradual(
        optax.adamw(1e-3), EVENTS, packed=True, grow=jp.grow.gradient()
    ),
    "straight_through": lambda: jp.straight_through(
        optax.adamw(1e-3), EVENTS, freeze=3
    ),
    "admm": lambda: jp.admm(optax.adamw(1e-3), 0.5, begin=1, end=3, interval=1),
    "lora": lambda: jp.lora(optax.adamw(1e-3), rank=2),
    "tracked": lambda: optax.chain(
        jp.track_gradients(average=("square", "taylor")),
        optax.adamw(1e-3),
        jp.track_importance(average=("weight", "magnitude")),
    ),
    "tracked in int8": lambda: optax.chain(
        optax.adamw(1e-3), jp.track_importance(storage="int8")
    ),
}
PATTERNS = ["unstructured", "per-output", "2:4", "2x2", "channel"]
X = correlated(0, 64, 16)
HESSIAN = (X.T @ X / 64).astype(np.float32)


def _masks():
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), PARAMS)


def lowered(function, *args):
    """The program for both; a kernel that one of them lacks is an error."""
    exported = jax.export.export(jax.jit(function), platforms=("cuda", "tpu"))(*args)
    assert exported.platforms == ("cuda", "tpu")
    return exported


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_training_step(name):
    tx = TRANSFORMATIONS[name]()

    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    lowered(step, params, jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("allocation", ["layer", "global"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruning(pattern, allocation):
    share = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    scores = jp.scores.magnitude(PARAMS)
    lowered(lambda p, s: jp.prune(p, s, share, **how), PARAMS, scores)


@pytest.mark.parametrize(
    "solve",
    [
        functools.partial(sparsegpt.solve, kept=64),
        functools.partial(sparsegpt.solve, kept=64, pattern=jp.patterns.NM(2, 4)),
        functools.partial(alps.solve, kept=64),
        functools.partial(
            units.remove, units=np.arange(16).reshape(8, 2), lost=3, at_once=1
        ),
    ],
    ids=["sparsegpt", "sparsegpt, 2:4", "alps", "units"],
)
def test_a_solver(solve):
    lowered(lambda weight, hessian: solve(weight, hessian), draw(3, 16, 8), HESSIAN)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_decoder_and_what_it_writes(family):
    config = hf.decoder_config(tiny_hf.config_json(family))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    tokens = np.zeros((2, 8), np.int32)
    lowered(lambda state, x: nnx.merge(graph, state)(x), state, tokens)

    def written(state, prompt, key):
        own = nnx.merge(graph, state)
        return generate.generate(own, prompt, steps=4, key=key)

    lowered(written, state, tokens, jax.random.key(0))


def test_what_is_left_of_a_function_after_shrinking():
    def network(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]

    params = jax.tree.map(jnp.asarray, PARAMS)
    x = jnp.ones((4, 8))
    small = jp.shrink(network, params, x, jp.scores.magnitude(params), sparsity=0.5)
    assert small.params["down"].shape == (8, 8)
    exported = lowered(small.fn, small.params, x)
    assert [o.shape for o in exported.out_avals] == [(4, 8)]


def test_a_program_that_one_of_them_lacks_is_found():
    with pytest.raises(NotImplementedError, match="MLIR translation rule"):
        lowered(lambda x: jax.lax.linalg.schur(x), np.eye(3, dtype=np.float32))
