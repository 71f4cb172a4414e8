"""LoRA as an optimizer: equal to adapters merged at the end, zeros where pruned."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp


def draw(seed, *shape, scale=1):
    drawn = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(drawn, jnp.float32)


def weights():
    return {
        "up": {"kernel": draw(0, 8, 16, scale=1 / 3)},
        "down": {"kernel": draw(1, 16, 4, scale=1 / 4), "bias": draw(2, 4)},
        "stack": {"kernel": draw(3, 3, 4, 4, scale=1 / 2)},
    }


X, Y = draw(7, 32, 8), draw(8, 32, 4)


def loss(params):
    x = jnp.tanh(X @ params["up"]["kernel"]) @ params["down"]["kernel"]
    x = x + params["down"]["bias"][None]
    layer = lambda x, kernel: (x + jnp.tanh(x @ kernel), None)  # noqa: E731
    x, _ = jax.lax.scan(layer, x, params["stack"]["kernel"])
    return jnp.mean((x - Y) ** 2)


def trained(tx, params, steps=20, loss=loss):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def adapted(params, adapters, scale, masks=None):
    """The textbook: W_0 + s M * (A B) where there is an adapter."""
    masks = jax.tree.map(lambda w: jnp.ones_like(w, bool), params) | (masks or {})

    def leaf(a, b, weight, mask):
        if jp.tree.is_excluded(a):
            return weight
        return weight + jnp.where(mask, scale * a @ b, 0)

    return jax.tree.map(leaf, *adapters, params, masks, is_leaf=jp.tree.is_excluded)


def change(merged, params):
    after, before = (
        np.asarray(x["up"]["kernel"], np.float64) for x in (merged, params)
    )
    return after - before


INNER = {
    "sgd": optax.sgd(0.05, momentum=0.9),
    "adamw": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(3e-3, weight_decay=0.1)
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(("inner", "alpha"), [("sgd", None), ("adamw", 5.0)])
def test_it_equals_adapters_that_are_merged_at_the_end(inner, alpha):
    params = weights()
    tx = jp.contrib.lora(INNER[inner], rank=2, alpha=alpha)
    merged, state = trained(tx, params)
    start = tx.init(params).adapters
    scale = (alpha or 2) / 2

    def adapter_loss(adapters):
        return loss(adapted(params, adapters, scale))

    adapters, _ = trained(INNER[inner], start, loss=adapter_loss)
    chex.assert_trees_all_close(state.adapters, adapters, atol=1e-4)
    expected = jax.jit(adapted, static_argnums=2)(params, adapters, scale)
    # Twenty sums, one after the other, in place of one at the end.
    chex.assert_trees_all_close(merged, expected, atol=1e-4)
    moved = np.abs(change(merged, params)).max()
    assert moved > 1e-2
    np.testing.assert_array_equal(merged["down"]["bias"], params["down"]["bias"])


def test_an_optimizer_of_nnx_takes_the_same_steps():
    class Net(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.arange(32.0).reshape(8, 4) / 32)
            self.bias = nnx.Param(jnp.ones(4))

    net = Net()
    params = {"kernel": net.kernel[...], "bias": net.bias[...]}
    mask = {"kernel": params["kernel"] > 0.5, "bias": None}
    tx = jp.keep_masks(jp.contrib.lora(optax.adam(1e-2), rank=2), mask)
    own, state = nnx.Optimizer(net, tx, wrt=nnx.Param), tx.init(params)
    for _ in range(3):
        gradients = jax.tree.map(jnp.cos, params)
        own.update(net, jax.tree.map(jnp.cos, nnx.state(net, nnx.Param)))
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(net.kernel[...], params["kernel"])
    assert (params["kernel"] == 0).sum() == 17


@pytest.mark.full
def test_a_change_has_the_rank_and_no_more():
    params = weights()
    merged, _ = trained(jp.contrib.lora(optax.adam(1e-2), rank=3), params)
    values = np.linalg.svd(change(merged, params), compute_uv=False)
    assert values[2] > 1e-3 > 1e-5 > values[3]


@pytest.mark.full
def test_pruned_weights_stay_at_zero_and_the_rest_is_the_masked_adapter():
    dense = weights()

    @jax.jit
    def halved(dense):
        scores = jp.scores.magnitude(dense)
        masks = jp.masks.make(scores, 0.5, allocation="global")
        return masks, jp.masks.apply(dense, masks)

    masks, params = halved(dense)
    inner = INNER["adamw"]
    tx = jp.keep_masks(jp.contrib.lora(inner, rank=2), masks)
    merged, _ = trained(tx, params)
    for name, mask in jp.tree.named_leaves(masks).items():
        if not jp.tree.is_excluded(mask):
            weight = np.asarray(jp.tree.named_leaves(merged)[name])
            assert (weight[~np.asarray(mask)] == 0).all()
            assert (weight[np.asarray(mask)] != 0).all()
    full = {
        part: leaves | {"kernel": masks[part]["kernel"]}
        for part, leaves in jax.tree.map(
            lambda w: np.ones(w.shape, bool), params
        ).items()
    }

    def adapter_loss(adapters):
        return loss(adapted(params, adapters, 1.0, full))

    start = jp.contrib.lora(inner, rank=2).init(params).adapters
    adapters, _ = trained(inner, start, loss=adapter_loss)
    expected = jax.jit(adapted, static_argnums=2)(params, adapters, 1.0, full)
    chex.assert_trees_all_close(merged, expected, atol=1e-5)


def test_the_tracker_sees_weights_and_not_factors():
    params = weights()
    tx = optax.chain(
        jp.track_gradients(),
        jp.contrib.lora(optax.adam(1e-2), rank=2),
        jp.track_importance(),
    )
    state = jax.eval_shape(lambda p: trained(tx, p, steps=1)[1], params)
    importance = jp.get_importance(state)
    shape = params["up"]["kernel"].shape
    assert importance.weight["up"]["kernel"].shape == shape
    assert importance.square["up"]["kernel"].shape == shape


def test_the_factors_moments_are_not_taken_for_the_weights():
    params = weights()
    tx = optax.chain(jp.contrib.lora(optax.adam(1e-2), rank=2), jp.track_importance())
    state = tx.init(params)
    assert jp.get_importance(state).square is None
    with pytest.raises(ValueError, match="track_gradients"):
        jp.scores.preconditioned_magnitude(params, jp.get_importance(state))
    with pytest.raises(ValueError, match="tracks nothing"):
        jp.get_importance(jp.contrib.lora(optax.adam(1e-2), rank=2).init(params))


def test_a_frozen_leaf_needs_no_gradient():
    params = weights()
    tx = jp.contrib.lora(optax.sgd(0.1), rank=2)
    gradients, state = jax.tree.map(np.ones_like, params), tx.init(params)
    full, _ = jax.jit(tx.update)(gradients, state, params)
    gradients["down"]["bias"] = None
    less, _ = jax.jit(tx.update)(gradients, state, params)
    assert less["down"]["bias"] is None
    chex.assert_trees_all_equal(less["up"], full["up"])


def test_moments_are_as_small_as_the_factors():
    params = weights()
    state = jp.contrib.lora(optax.adam(1e-2), rank=1).init(params)
    factors = 8 + 16 + 16 + 4 + 3 * (4 + 4)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.adapters)) == factors
    assert sum(leaf.size for leaf in jax.tree.leaves(state.inner)) == 2 * factors + 1


def test_a_rank_over_the_shorter_side_is_that_side():
    state = jp.contrib.lora(optax.sgd(1.0), rank=64).init(weights())
    assert state.adapters.a["down"]["kernel"].shape == (16, 4)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.full)]
)
def test_on_eight_devices_it_takes_the_same_steps(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(kind, kind))
    params = weights()
    del params["down"]["kernel"]  # a matrix and a stack will do
    tx = jp.contrib.lora(optax.adam(1e-2), rank=2)

    def distance(params):
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    alone, _ = trained(tx, params, loss=distance)

    def place(leaf):
        spec = [None] * leaf.ndim
        for axis, name in ((-1, "model"), (-2, "fsdp")):
            if leaf.ndim >= -axis and leaf.shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
        return NamedSharding(mesh, PartitionSpec(*spec))

    split = jax.device_put(params, jax.tree.map(place, params))
    state = tx.init(split)
    assert state.adapters.a["up"]["kernel"].sharding.spec[0] == "fsdp"
    assert state.adapters.b["up"]["kernel"].sharding.spec[1] == "model"
    places = jax.tree.map(lambda leaf: leaf.sharding, state.adapters)
    merged, state = trained(tx, split, loss=distance)
    chex.assert_trees_all_close(jax.device_get(merged), alone, atol=1e-4)
    for old, leaf in zip(
        jax.tree.leaves(places), jax.tree.leaves(state.adapters), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(old, leaf.ndim)
    kernel = merged["up"]["kernel"]
    assert kernel.sharding.is_equivalent_to(place(params["up"]["kernel"]), 2)


def lora_of(params, targets):
    return jp.contrib.lora(optax.sgd(0.1), 2, targets=targets).init(params)


def searched():
    tx, params = jp.contrib.lora(optax.lbfgs(), rank=2), weights()
    options = {"value": 1.0, "grad": params, "value_fn": loss}
    return tx.update(params, tx.init(params), params, **options)


CODES = {"codes": jnp.ones((4, 3), jnp.int32), "w": jnp.ones((4, 3))}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: jp.contrib.lora(optax.sgd(1.0), 0), "rank >= 1"),
        (lambda: jp.contrib.lora(optax.sgd(1.0), 2, alpha=0.0), "alpha > 0"),
        (lambda: jp.contrib.lora(optax.sgd(1.0), 2, alpha=float("nan")), "alpha > 0"),
        (lambda: lora_of(weights(), lambda name, leaf: False), "got none"),
        (lambda: lora_of(weights(), lambda name, leaf: True), "down/bias"),
        (lambda: lora_of(CODES, lambda name, leaf: True), "but 'codes' are not"),
        (searched, "line search"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
