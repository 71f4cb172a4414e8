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
from tests.support.trajectories import compiles, gradients, record, same_bits

SCHEDULE = jp.schedules.linear(0.75, begin=2, end=9, every=3)
STEPS = 12
SIZE = 12 * 20
TABLE = {
    "gradual": functools.partial(jp.gradual, schedule=SCHEDULE),
    "gradual, packed": functools.partial(jp.gradual, schedule=SCHEDULE, packed=True),
    "straight_through": functools.partial(
        jp.straight_through, schedule=SCHEDULE, freeze=10, every=2
    ),
    "admm": functools.partial(jp.admm, sparsity=0.75, begin=2, end=9, interval=3),
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
    key = jax.random.split(jax.random.key(3), 2)
    return {
        "bias": jax.random.normal(key[0], (20,)),
        "kernel": jax.random.normal(key[1], (12, 20)),
    }


def expected(make, steps=STEPS):
    """Zeros after each step, from the schedule alone."""
    table = {9: 0.75} if make is TABLE["admm"] else SCHEDULE.table()
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


COMPOSED = {
    "chain with a tracker": lambda make: optax.chain(
        make(optax.adamw(0.01)), jp.track_importance()
    ),
    "clipping inside": lambda make: make(
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01))
    ),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(optax.adamw(0.01)), 3),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(
        lambda learning_rate: make(optax.adamw(learning_rate))
    )(learning_rate=0.01),
    "partition": lambda make: optax.partition(
        {"pruned": make(optax.adamw(0.01)), "plain": optax.sgd(0.01)},
        {"kernel": "pruned", "bias": "plain"},
    ),
    "tracked squares inside": lambda make: make(
        optax.chain(jp.track_gradients(), optax.sgd(0.01))
        if make is not TABLE["admm"]
        else optax.sgd(0.01)
    ),
}


@kinds
@pytest.mark.parametrize(
    "compose",
    [
        pytest.param(
            compose,
            id=name,
            marks=() if name in ("clipping inside", "partition") else pytest.mark.full,
        )
        for name, compose in COMPOSED.items()
    ],
)
def test_zeros_are_the_schedules_in_every_composition(compose, make):
    params = model()
    done = run(compose(make), params)
    assert zeros(done.weights["kernel"]) == expected(make)
    masks = jp.get_masks(done.state)
    assert isinstance(masks["bias"], optax.MaskedNode)
    np.testing.assert_array_equal(masks["kernel"], done.params["kernel"] != 0)
    kept = jnp.ones((12, 20), bool)
    other = jp.get_masks(jp.replace_masks(done.state, masks | {"kernel": kept}))
    assert other["kernel"].all()


@kinds
def test_multi_steps_counts_real_steps(make):
    params = model()
    tx = optax.MultiSteps(make(optax.adamw(0.01)), 2)
    done = run(tx, params, 2 * STEPS)
    assert zeros(done.weights["kernel"][1::2]) == expected(make)
    assert int(np.sum(jp.get_masks(done.state)["kernel"])) == SIZE - expected(make)[-1]


@kinds
def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted(make):
    params = model()
    grads = gradients(params, STEPS)
    tx = optax.apply_if_finite(make(optax.adamw(0.01)), 3)
    grads["kernel"] = grads["kernel"].at[5].set(jnp.nan)
    done = record(tx, params, grads)
    counts = expected(make)
    late = counts[:5] + counts[4:-1]
    assert zeros(done.weights["kernel"]) == late


@kinds
def test_lora_inside_is_pruned_as_it_is_merged(make):
    params, by_size = model(), {"criterion": jp.scores.magnitude}
    done = run(make(jp.lora(optax.adamw(0.05), rank=2), **by_size), params)
    assert zeros(done.weights["kernel"]) == expected(make)
    np.testing.assert_array_equal(done.params["bias"], params["bias"])
    pruned = jp.masks.apply(params, jp.get_masks(done.state))
    assert np.any(done.params["kernel"] != pruned["kernel"])


@kinds
def test_donated_steps_are_the_steps_that_are_not(make):
    params = model()
    tx = make(optax.adamw(0.01))
    grads = gradients(params, STEPS)

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def run(step, params):
        state = tx.init(params)
        for n in range(STEPS):
            gradient = jax.tree.map(lambda g, n=n: g[n], grads)
            params, state = step(params, state, gradient)
        return params, state

    whole = run(jax.jit(step), params)
    copies = jax.tree.map(jnp.copy, params)
    donated = run(jax.jit(step, donate_argnums=(0, 1)), copies)
    # They are two programs: XLA may fuse a product and a sum in one of them alone.
    chex.assert_trees_all_close(donated, whole, rtol=1e-5)
    assert same_bits(jp.get_masks(donated[1]), jp.get_masks(whole[1]))


@kinds
def test_a_run_resumed_in_the_middle_ends_with_the_same_bits(make, tmp_path):
    params = model()
    tx = make(optax.adamw(0.01))
    grads = gradients(params, STEPS)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    part = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads)[0])
    half = lambda s: jax.tree.map(lambda g: g[s], grads)  # noqa: E731
    middle = part((params, tx.init(params)), half(slice(0, 6)))
    leaves, structure = jax.tree.flatten(jax.device_get(middle))
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    resumed = part(jax.tree.unflatten(structure, leaves), half(slice(6, STEPS)))
    assert same_bits(resumed, part(middle, half(slice(6, STEPS))))


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
    for n in range(STEPS):
        step(linear, optimizer, jax.tree.map(lambda g, n=n: g[n], grads))
        counts.append(int((linear.kernel[...] == 0).sum()))
    assert counts == expected(make)
    plain = run(make(optax.adamw(0.01)), model())
    np.testing.assert_array_equal(linear.kernel[...], plain.params["kernel"])
    shapes = jax.eval_shape(model)
    for state in (optimizer, nnx.state(optimizer)):
        if make is TABLE["gradual, packed"]:
            with pytest.raises(ValueError, match=r"'kernel' has none; call jp\.get_"):
                jp.get_masks(state)
        masks = jp.get_masks(state, shapes)
        (mask,) = jax.tree.leaves(masks)
        assert mask.dtype == bool
        state = jp.replace_masks(state, jax.tree.map(jnp.ones_like, masks))
        assert all(x.all() for x in jax.tree.leaves(jp.get_masks(state, shapes)))
        np.testing.assert_array_equal(mask, linear.kernel[...] != 0)


@kinds
@pytest.mark.parametrize(
    "kind",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.full)],
    ids=str,
)
def test_eight_devices_prune_what_one_prunes(make, kind):
    params = model()
    grads = gradients(params, 1)
    gradient = jax.tree.map(lambda g: g[0], grads)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    where = {
        "bias": NamedSharding(mesh, PartitionSpec()),
        "kernel": NamedSharding(mesh, PartitionSpec("data", "model")),
    }
    tx = make(optax.chain(jp.track_gradients(), optax.sgd(0.125)))
    if make is TABLE["admm"]:  # it averages the squares itself
        tx = make(optax.sgd(0.125))

    def end(params, gradient):
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        with compiles() as programs:
            for _ in range(STEPS):  # one at a time: eight devices share a few cores
                params, state = jax.block_until_ready(step(params, state))
        assert len(programs) == 1
        return params, state

    one, _ = end(params, gradient)
    eight, state = end(jax.device_put(params, where), jax.device_put(gradient, where))
    np.testing.assert_array_equal(eight["kernel"], one["kernel"])
    masks = jp.get_masks(state)
    if make is TABLE["gradual, packed"]:  # ten of a row on a device are no whole bytes
        return
    assert masks["kernel"].sharding.is_equivalent_to(where["kernel"], 2)
