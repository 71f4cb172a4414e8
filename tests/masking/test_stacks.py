"""Stacked layers ranked one by one, heads of attention, and leaves that lose all."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import same_bits

RANDOM = np.random.default_rng(0)
# Three layers of very different size, as a scan stacks them.
STACK = RANDOM.uniform(1, 2, (3, 8, 12)) * np.array([1, 10, 100]).reshape(3, 1, 1)
STACK = STACK.astype(np.float32)
KEEP = {
    "unstructured": lambda layer: oracles.keep_top(layer, 48),
    "per-output": lambda layer: np.stack(
        [oracles.keep_top(column, 4) for column in layer.T], 1
    ),
    "2x2": lambda layer: oracles.keep_blocks(layer, 2, 2, 0.5),
    "channel": lambda layer: oracles.keep_channels(layer, 0.5),
    "2:4": lambda layer: oracles.keep_nm(layer, 2, 4),
}


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(name, marks=() if name in ("2x2", "2:4") else pytest.mark.full)
        for name in KEEP
    ],
)
def test_every_layer_of_a_stack_loses_its_own_share(pattern):
    scores = {"blocks": {"kernel": jnp.asarray(STACK)}}
    how = {"allocation": "matrix", "pattern": pattern}
    sparsity = None if pattern == "2:4" else 0.5
    masks = jp.masks.make(scores, sparsity, **how)
    expected = np.stack([KEEP[pattern](layer) for layer in STACK])
    np.testing.assert_array_equal(masks["blocks"]["kernel"], expected)
    pruned = jp.prune(scores, scores, sparsity, **how)
    assert same_bits(pruned, jp.masks.apply(scores, masks))


def test_as_one_leaf_a_layer_of_small_weights_loses_all():
    """What "layer" does, and "matrix" is there for."""
    masks = jp.masks.make({"kernel": jnp.asarray(STACK)}, 1 / 3)
    assert not np.asarray(masks["kernel"])[0].any()


@pytest.mark.full
def test_ranked_by_matrix_it_is_the_same_under_jit_and_on_a_mesh():
    ties = np.round(STACK[[0, 0, 1, 2]] * 2)
    expected = np.stack([KEEP["unstructured"](layer) for layer in ties])

    def make(scores):
        return jp.masks.make({"kernel": scores}, 0.5, allocation="matrix")["kernel"]

    np.testing.assert_array_equal(jax.jit(make)(jnp.asarray(ties)), expected)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
        spread = NamedSharding(mesh, PartitionSpec("x", "y"))
        mask = make(jax.device_put(ties, spread))
        np.testing.assert_array_equal(mask, expected)
        assert mask.sharding.is_equivalent_to(spread, 3)


def test_two_axes_of_layers_and_rules_by_name():
    four = np.abs(RANDOM.normal(size=(2, 3, 4, 6))).astype(np.float32)
    scores = {"experts": jnp.asarray(four), "flat": jnp.asarray(four[0, 0])}
    how = {"allocation": "matrix", "axes": {"experts": jp.Axes()}}
    masks = jp.masks.make(scores, {"experts": 0.25}, **how)
    expected = [[oracles.keep_top(matrix, 6) for matrix in layer] for layer in four]
    np.testing.assert_array_equal(masks["experts"], np.array(expected))
    assert np.asarray(masks["flat"]).all()


def test_a_matrix_and_a_vector_are_ranked_as_they_are():
    scores = {"bias": np.arange(8, dtype=np.float32), "kernel": STACK[0]}
    masks = jp.masks.make(scores, 0.5, allocation="matrix")
    assert np.asarray(masks["bias"]).tolist() == [False] * 4 + [True] * 4
    np.testing.assert_array_equal(masks["kernel"], KEEP["unstructured"](STACK[0]))


def test_a_stack_along_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"own axes come first, but 'w' have them"):
        jp.masks.make(
            {"w": STACK},
            0.5,
            allocation=jp.allocation.PerMatrix(),
            axes=jp.Axes((0,), (1,)),
        )


def heads(stack=()):
    """Every kernel is a matrix of 12 x 12, so all share what is compiled."""
    attention = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            num_heads=4, in_features=12, decode=False, rngs=nnx.Rngs(0)
        )
    )
    params = {"attention": nnx.as_pure(nnx.state(attention, nnx.Param))}
    shape = lambda x: (*stack, *x.shape)  # noqa: E731
    return jax.tree.map(
        lambda x: jnp.asarray(RANDOM.normal(size=shape(x)), jnp.float32), params
    )


def matrix(name, kernel):
    """A kernel of one layer as (in, out)."""
    kernel = np.asarray(kernel)
    if name == "out":
        return kernel.reshape(-1, kernel.shape[-1])
    return kernel.reshape(kernel.shape[0], -1)


@pytest.mark.parametrize("pattern", ["2:4", "channel"])
def test_heads_of_flax_are_outputs_on_the_way_in_and_inputs_on_the_way_out(pattern):
    params = heads()
    scores = jp.scores.magnitude(
        params, prunable=lambda name, leaf: name.endswith("kernel")
    )
    sparsity = None if pattern == "2:4" else 0.5
    masks = jp.masks.make(scores, sparsity, allocation="layer", pattern=pattern)
    masks = masks["attention"]
    for name in ("query", "key", "value", "out"):
        own = matrix(name, scores["attention"][name]["kernel"])
        expected = KEEP[pattern](own)
        np.testing.assert_array_equal(matrix(name, masks[name]["kernel"]), expected)


def test_stacked_attention_has_heads_and_a_stack_named_like_it_has_none():
    stacked = heads(stack=(5,))
    rule = lambda name, leaf: name.endswith("kernel")  # noqa: E731
    scores = jp.scores.magnitude(stacked, prunable=rule)
    masks = jp.masks.make(scores, pattern="2:4")["attention"]
    for layer in range(5):
        for name in ("query", "out"):
            own = np.asarray(scores["attention"][name]["kernel"])[layer]
            mask = np.asarray(masks[name]["kernel"])[layer]
            expected = oracles.keep_nm(matrix(name, own), 2, 4)
            np.testing.assert_array_equal(matrix(name, mask), expected)
    plain = {name: {"kernel": jnp.asarray(STACK)} for name in ("query", "out")}
    masks = jp.masks.make(plain, pattern="2:4")
    for layer, mask in zip(STACK, masks["query"]["kernel"], strict=True):
        np.testing.assert_array_equal(mask, oracles.keep_nm(layer, 2, 4))


@pytest.mark.full
def test_a_leaf_that_would_lose_all_is_named():
    shapes = {"empty": (0, 4), "small": (2, 2), "large": (8, 12)}
    scores = {k: jnp.asarray(np.ones(v, np.float32)) for k, v in shapes.items()}
    for allocation in ("layer", "matrix"):
        with pytest.warns(UserWarning, match=r"leaves nothing of 'small', which"):
            jp.masks.make(scores, 0.9, allocation=allocation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.masks.make(scores, 0.8, allocation="layer")
    del scores["empty"]
    with pytest.warns(UserWarning, match=r"leaves nothing of 'small', which"):
        jp.prune(scores, scores, 0.9, allocation="layer", pattern="channel")


@pytest.mark.full
def test_owl_takes_the_parts_of_a_leaf_for_parts_of_its_layer():
    """Three matrices of a block, one by one or as one leaf of three."""
    draw = np.random.default_rng(0).normal
    apart = [
        {
            name: jnp.asarray(draw(size=(6, 6)) ** (1 + 4 * i), jnp.float32)
            for name in ("q", "k", "v", "up")
        }
        for i in range(2)
    ]
    joined = [
        {"qkv": jnp.stack([own[name] for name in "qkv"]), "up": own["up"]}
        for own in apart
    ]

    def run(parts, params, x):
        for own in params["blocks"]:
            q, k, v = (x @ weight for weight in parts(own))
            x = jnp.tanh(jnp.tanh(q * k + v) @ own["up"])
        return x

    batch = jnp.asarray(draw(size=(20, 6)), jnp.float32)

    def zeros(blocks, parts):
        found = jp.prune_trained(
            lambda params, x: run(parts, params, x),
            {"blocks": blocks},
            [batch],
            jp.passes.wanda(0.5, allocation=jp.allocation.OWL(spread=0.2, factor=3.0)),
        )
        named = jp.sparsity(found.params).by_leaf.items()
        return [sum(n for name, (n, _) in named if f"/{i}/" in name) for i in (0, 1)]

    one = zeros(apart, lambda own: [own[name] for name in "qkv"])
    other = zeros(joined, lambda own: [own["qkv"][i] for i in range(3)])
    assert one == other
    assert one[0] != one[1]
