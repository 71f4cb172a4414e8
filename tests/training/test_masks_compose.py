"""Transformations with masks inside of others: exact zeros in every composition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support.compilations import compiled
from tests.support.trajectories import gradients, record, same_bits

pytestmark = pytest.mark.jax_api

SCHEDULE = jp.schedules.linear(0.75, begin=2, end=9, every=3)
STEPS = 12
SIZE = 12 * 20
TABLE = {
    "gradual": functools.partial(jp.gradual, schedule=SCHEDULE),
    "gradual, packed": functools.partial(jp.gradual, schedule=SCHEDULE, packed=True),
    "gradual, grown": functools.partial(jp.gradual, schedule=SCHEDULE, grow="set"),
    "straight_through": functools.partial(
        jp.straight_through, schedule=SCHEDULE, freeze=10, every=2
    ),
}
FIRST = "gradual"
# The other transformations share their masks' code with the first.
kinds = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=() if name == FIRST else pytest.mark.full)
        for name, make in TABLE.items()
    ],
)


def model():
    random = np.random.default_rng(3)
    return {
        "bias": jnp.asarray(random.normal(size=20), jnp.float32),
        "kernel": jnp.asarray(random.normal(size=(12, 20)), jnp.float32),
    }


def expected(make, steps=STEPS):
    """Zeros after each step, from the schedule alone."""
    table = SCHEDULE.table()
    found, now = [], 0.0
    for step in range(steps):
        now = table.get(step, now)
        found.append(round(now * SIZE))
    return found


def zeros(kernels):
    kernels = np.asarray(kernels)
    assert not np.signbit(kernels[kernels == 0]).any()
    return (kernels == 0).sum((1, 2)).tolist()


def run(tx, params, steps=STEPS, **extra):
    return record(tx, params, gradients(params, steps), **extra)


def each_step(grads):
    """The gradient of each step, of NumPy: slices of it compile nothing."""
    grads = jax.device_get(grads)
    return [jax.tree.map(lambda g, n=n: g[n], grads) for n in range(STEPS)]


@functools.cache
def half_way(make):
    """A compiled function that takes six steps, and what (params, state) they end in.

    That is at half of the way, and at its end.
    """
    params = model()
    tx = make(optax.adamw(0.01))
    grads = jax.device_get(gradients(params, STEPS))

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    part = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads)[0])
    first, second = (
        jax.tree.map(lambda g, half=half: g[half], grads)
        for half in (slice(0, STEPS // 2), slice(STEPS // 2, STEPS))
    )
    middle = part((params, tx.init(params)), first)
    rest = functools.partial(part, grads=second)
    return rest, middle, rest(middle)


def check_masks(done):
    """They are where the weights are, and can be replaced."""
    masks = jp.masks.get(done.state)
    assert isinstance(masks["bias"], optax.MaskedNode)
    np.testing.assert_array_equal(
        masks["kernel"], np.asarray(done.params["kernel"]) != 0
    )
    kept = jnp.asarray(np.ones((12, 20), bool))
    other = jp.masks.get(jp.masks.replace(done.state, masks | {"kernel": kept}))
    assert np.all(other["kernel"])


@pytest.mark.full
@kinds
def test_zeros_are_the_schedules_with_clipping_a_tracker_and_hyperparameters(make):
    def chained(rate):
        clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate))
        return optax.chain(make(clipped), jp.track_importance())

    done = run(optax.inject_hyperparams(chained)(rate=0.01), model())
    assert zeros(done.weights["kernel"]) == expected(make)
    check_masks(done)


@kinds
def test_multi_steps_of_a_partition_counts_real_steps(make):
    parts = {"pruned": make(optax.adamw(0.01)), "plain": optax.sgd(0.01)}
    tx = optax.partition(parts, {"kernel": "pruned", "bias": "plain"})
    done = run(optax.MultiSteps(tx, 2), model(), 2 * STEPS)
    assert zeros(np.asarray(done.weights["kernel"])[1::2]) == expected(make)
    check_masks(done)


@kinds
def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted(make):
    params = model()
    grads = gradients(params, STEPS)
    tx = optax.apply_if_finite(make(optax.adamw(0.01)), 3)
    kernel = np.array(grads["kernel"])
    kernel[5] = np.nan
    done = record(tx, params, grads | {"kernel": jnp.asarray(kernel)})
    counts = expected(make)
    late = counts[:5] + counts[4:-1]
    assert zeros(done.weights["kernel"]) == late
    check_masks(done)


@pytest.mark.full
@kinds
def test_lora_inside_is_pruned_as_it_is_merged(make):
    params, by_size = model(), {"criterion": jp.scores.magnitude}
    done = run(make(jp.contrib.lora(optax.adamw(0.05), rank=2), **by_size), params)
    assert zeros(done.weights["kernel"]) == expected(make)
    np.testing.assert_array_equal(done.params["bias"], params["bias"])
    mask = np.asarray(jp.masks.get(done.state)["kernel"])
    pruned = np.where(mask, params["kernel"], 0)
    assert np.any(np.asarray(done.params["kernel"]) != pruned)


@pytest.mark.full
@kinds
def test_donated_steps_are_the_steps_that_are_not(make):
    tx = make(optax.adamw(0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = model()
    state = tx.init(params)
    for gradient in each_step(gradients(params, STEPS)):
        params, state = step(params, state, gradient)
    _, _, whole = half_way(make)
    # They are two programs: XLA may fuse a product and a sum in one of them alone.
    chex.assert_trees_all_close((params, state), whole, rtol=1e-5)
    assert same_bits(jp.masks.get(state), jp.masks.get(whole[1]))


@kinds
def test_a_run_resumed_in_the_middle_ends_with_the_same_bits(make, tmp_path):
    rest, middle, end = half_way(make)
    leaves, structure = jax.tree.flatten(jax.device_get(middle))
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    assert same_bits(rest(jax.tree.unflatten(structure, leaves)), end)


@kinds
def test_nnx_optimizer_needs_nothing_more(make):
    class Linear(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(model()["kernel"])
            self.bias = nnx.Param(model()["bias"])

    linear = Linear()
    optimizer = nnx.Optimizer(linear, make(optax.adamw(0.01)), wrt=nnx.Param)
    grads = gradients(model(), STEPS)

    @nnx.jit
    def step(linear, optimizer, gradient):
        state = nnx.state(linear, nnx.Param)
        optimizer.update(
            linear,
            nnx.State(
                dict(
                    zip(
                        state,
                        (state[name].replace(gradient[name]) for name in state),
                        strict=True,
                    )
                )
            ),
        )

    counts = []
    for gradient in each_step(grads):
        step(linear, optimizer, gradient)
        counts.append(int((np.asarray(linear.kernel[...]) == 0).sum()))
    assert counts == expected(make)
    _, _, (plain, _) = half_way(make)
    np.testing.assert_array_equal(linear.kernel[...], plain["kernel"])
    shapes = jax.eval_shape(model)
    for state in (optimizer, nnx.state(optimizer)):
        if make is TABLE["gradual, packed"]:
            with pytest.raises(ValueError, match=r"'kernel' has none; call jp\.masks"):
                jp.masks.get(state)
        masks = jp.masks.get(state, shapes)
        (mask,) = jax.tree.leaves(masks)
        assert mask.dtype == bool
        state = jp.masks.replace(state, jax.tree.map(jnp.ones_like, masks))
        assert all(np.all(x) for x in jax.tree.leaves(jp.masks.get(state, shapes)))
        np.testing.assert_array_equal(mask, np.asarray(linear.kernel[...]) != 0)


def end(make, params, gradient):
    """After twelve steps with squares tracked inside, in one program."""
    tx = make(optax.chain(jp.track_gradients(), optax.sgd(0.125)))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    kernels = []
    with compiled() as programs:
        for _ in range(STEPS):  # one at a time: eight devices share a few cores
            params, state = jax.block_until_ready(step(params, state))
            kernels.append(jax.device_get(params["kernel"]))
    assert len(programs) == 1
    assert zeros(kernels) == expected(make)
    return params, state


@functools.cache
def end_on_one(make):
    params = model()
    return end(make, params, each_step(gradients(params, STEPS))[0])[0]


@pytest.mark.full
@kinds
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_eight_devices_prune_what_one_prunes(make, kind):
    params = model()
    gradient = each_step(gradients(params, STEPS))[0]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    where = {
        "bias": NamedSharding(mesh, PartitionSpec()),
        "kernel": NamedSharding(mesh, PartitionSpec("data", "model")),
    }
    eight, state = end(make, *(jax.device_put(x, where) for x in (params, gradient)))
    np.testing.assert_array_equal(eight["kernel"], end_on_one(make)["kernel"])
    masks = jp.masks.get(state)
    if make is TABLE["gradual, packed"]:  # ten of a row on a device are no whole bytes
        return
    assert masks["kernel"].sharding.is_equivalent_to(where["kernel"], 2)


def test_two_optimizers_with_masks_share_the_leaves_by_subtree():
    params = {"a": model(), "b": model()}
    tx = optax.partition(
        {
            "x": jp.gradual(optax.adam(0.1), {1: 0.5}),
            "y": TABLE[FIRST](optax.adam(0.1)),
        },
        {"a": "x", "b": "y"},
    )
    state = tx.init(params)
    found = jp.masks.get(state)
    assert found["a"]["kernel"].shape == found["b"]["kernel"].shape == (12, 20)
    assert found["a"]["bias"] == optax.MaskedNode()
    none = jax.tree.map(jnp.zeros_like, found)
    state = jp.masks.replace(state, none)
    chex.assert_trees_all_equal(jp.masks.get(state), none)


@pytest.mark.full
@pytest.mark.parametrize("labels", ["subtree", "leaf"])
def test_masks_of_the_whole_model_may_be_given_where_a_part_is_trained(labels):
    params = {"a": model(), "b": model()}
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
    each = {"a": "train", "b": "freeze"}
    if labels == "leaf":
        each = {k: dict.fromkeys(params[k], label) for k, label in each.items()}
    kept = jp.keep_masks(optax.adam(0.1), masks)
    tx = optax.partition({"train": kept, "freeze": optax.set_to_zero()}, each)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)
    assert int(jnp.sum(new["a"]["kernel"] == 0)) == SIZE // 2
    chex.assert_trees_all_equal(new["b"], params["b"])
    assert jax.tree.leaves(jp.masks.get(state)["b"]) == []
    foreign = jp.keep_masks(optax.adam(0.1), {**masks, "c": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="unknown 'c'"):
        optax.partition({"train": foreign, "freeze": optax.set_to_zero()}, each).init(
            params
        )


def test_a_rule_that_a_criterion_was_given_counts_beside_the_other():
    params = {"a": model(), "b": model()}
    rule = jp.tree.excluding("a/*")
    criterion = functools.partial(jp.scores.magnitude, prunable=rule)
    state = jp.gradual(optax.sgd(0.1), {1: 0.5}, criterion=criterion).init(params)
    found = jp.masks.get(state)
    assert jax.tree.leaves(found["a"]) == []
    assert found["b"]["kernel"].shape == (12, 20)


@pytest.mark.full
def test_packed_masks_of_one_bare_array():
    params = jnp.arange(1.0, 9.0)
    tx = jp.keep_masks(optax.sgd(0.1), params > 4, packed=True)
    updates, _ = tx.update(jnp.zeros(8), tx.init(params), params)
    assert (params + updates).tolist() == [0, 0, 0, 0, 5, 6, 7, 8]
