"""state_shardings places a whole optimizer state as the parameters are placed."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from experiments.harness import checkpoint
from jaxprune.contrib import state_shardings
from tests.support.trajectories import Module, containers

KINDS = [AxisType.Auto, AxisType.Explicit]
WIDE = (256, 128)
# No two of one shape, so that a state's leaf tells by its shape whose it is.
SPECS = {
    (16, 8): P("x", "y"),
    WIDE: P("x", "y"),
    (8, 24): P(None, "y"),
    (8,): P("y"),
    (4, 4): P(),
}

pytestmark = [
    pytest.mark.jax_api,
    pytest.mark.skipif(
        len(jax.devices()) < 8, reason="needs the eight CPU devices of conftest.py"
    ),
]


@pytest.fixture(params=KINDS, ids=str)
def mesh(request):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)


def put(mesh, shape, *spec):
    values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return jax.device_put(values, NamedSharding(mesh, P(*spec)))


def parameters(mesh):
    one, three, bias, four = (
        put(mesh, s, *spec) for s, spec in SPECS.items() if s != WIDE
    )
    return {"layer": {"kernel": one, "bias": bias}, "rest": ([three],), "own": four}


def masks(params):
    return jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf) > 0, leaf.sharding), params
    )


def two_dimensional(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


def trackers():
    return optax.chain(
        jp.track_gradients(average=("square", "taylor")),
        optax.sgd(0.125, momentum=0.5),
        jp.track_importance(average=("weight", "magnitude")),
    )


OPTIMIZERS = {
    "adamw": lambda _: optax.adamw(0.1),
    "trackers": lambda _: trackers(),
    "masked": lambda _: optax.masked(trackers(), two_dimensional),
    "partition": lambda _: optax.partition(
        {"matrix": trackers(), "vector": optax.adam(0.1)}, labels
    ),
    "MultiSteps": lambda _: optax.MultiSteps(trackers(), 2),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(optax.adamw)(0.1),
    "keep_masks": lambda params: optax.chain(
        jp.keep_masks(optax.adamw(0.1), masks(params)), jp.track_importance()
    ),
    "apply_if_finite": lambda _: optax.apply_if_finite(trackers(), 3),
    "schedule_free": lambda _: optax.contrib.schedule_free_adamw(0.1),
    "ema": lambda _: optax.chain(optax.ema(0.9), optax.add_noise(0.1, 0.1, 0)),
}


def assert_equal(shardings, wanted, rank):
    assert shardings.is_equivalent_to(wanted, rank), (shardings, wanted)


SOME = {
    AxisType.Auto: {"trackers", "MultiSteps", "partition", "keep_masks"},
    AxisType.Explicit: {"keep_masks"},
}
# What is of optax alone has no code for axes of another kind.
EXPLICIT = {"trackers", "MultiSteps", "partition", "keep_masks", "apply_if_finite"}


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.full] * (name not in SOME[kind]))
        for kind in KINDS
        for name in OPTIMIZERS
        if kind is AxisType.Auto or name in EXPLICIT
    ],
    indirect=["mesh"],
)
def test_every_leaf_of_a_state_is_placed_like_its_parameter(mesh, name):
    params = parameters(mesh)
    tx = OPTIMIZERS[name](params)
    where = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=where)(params)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    for leaf in jax.tree.leaves(state):
        spec = SPECS.get(leaf.shape, P())  # counters and keys
        assert_equal(leaf.sharding, NamedSharding(mesh, spec), leaf.ndim)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    before = jax.tree.map(lambda x: x.sharding, params)
    held = jax.jit(step, out_shardings=(before, where))
    for _ in range(2):
        params, state = held(params, state)
    for leaf, wanted in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((before, where)), strict=True
    ):
        assert_equal(leaf.sharding, wanted, leaf.ndim)


def test_without_state_shardings_adams_moments_are_replicated():
    """The trap that state_shardings is for; when this fails, it is needed no more."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": put(mesh, (16, 8), "x")}
    tx = optax.chain(optax.adam(0.1), jp.track_importance())
    state = jax.jit(tx.init)(params)
    assert state[0][0].mu["w"].sharding.is_fully_replicated
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
    assert state[0][0].mu["w"].sharding == params["w"].sharding


def test_factored_moments_and_histories_keep_what_their_shape_allows(mesh):
    params = {"w": put(mesh, WIDE, "x", "y"), "s": put(mesh, (256, 256), "x")}
    factored = state_shardings(optax.adafactor(0.1), params)[0]
    replicated = NamedSharding(mesh, P())
    assert_equal(factored.v_row["w"], NamedSharding(mesh, P("y")), 1)
    assert_equal(factored.v_col["w"], NamedSharding(mesh, P("x")), 1)
    assert_equal(factored.v["w"], replicated, 1)
    assert_equal(factored.v_row["s"], replicated, 1)  # rows or columns: who knows
    assert_equal(factored.v_col["s"], replicated, 1)
    history = state_shardings(optax.lbfgs(), params)[0]
    wanted = NamedSharding(mesh, P(None, "x", "y"))
    assert_equal(history.diff_params_memory["w"], wanted, 3)
    assert_equal(history.weights_memory, replicated, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Blocks:
    """One array in two, as a quantised one."""

    codes: Any
    exponents: Any


class BlocksState(NamedTuple):
    count: Any
    average: Any


def in_blocks(leaf):
    shape = (*leaf.shape[:-1], -(-leaf.shape[-1] // 32))
    return Blocks(jnp.zeros(leaf.shape, jnp.int8), jnp.zeros(shape, jnp.int8))


def quantised():
    def init(params):
        return BlocksState(jnp.zeros((), jnp.int32), jax.tree.map(in_blocks, params))

    return optax.GradientTransformation(
        init, lambda updates, state, _: (updates, state)
    )


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_lean_averages_and_those_in_host_memory_are_placed_there(mesh, storage, memory):
    params = parameters(mesh) | {"wide": put(mesh, WIDE, *SPECS[WIDE])}
    tx = jp.track_importance(storage=storage, memory=memory)
    where = state_shardings(tx, params)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params).weight)
    placed = jax.tree.leaves(where.weight)
    assert len(leaves) == len(placed) >= len(SPECS)
    for leaf, found in zip(leaves, placed, strict=True):
        assert found.memory_kind == memory
        assert_equal(
            found.with_memory_kind("device"),
            NamedSharding(mesh, SPECS.get(leaf.shape, P())),
            leaf.ndim,
        )
    assert where.step.memory_kind == "device"


@pytest.mark.parametrize("container", ["dict", "nnx.State"])
def test_a_number_for_each_block_is_sharded_where_the_blocks_divide(mesh, container):
    leaves = {
        "even": put(mesh, (16, 256), "x", "y"),
        "odd": put(mesh, (16, 96), "x", "y"),  # 3 blocks, 2 shards
        "one": put(mesh, (8,), "y"),
        "both": put(mesh, (8, 8 * 32), None, ("x", "y")),
    }
    wanted = {
        "even": P("x", "y"),
        "odd": P("x"),
        "one": P(),
        "both": P(None, ("x", "y")),
    }
    params = leaves
    if container == "nnx.State":
        params = nnx.State({k: nnx.Param(v) for k, v in leaves.items()})
    where = state_shardings(optax.chain(optax.identity(), quantised()), params)[1]
    for name, leaf in leaves.items():
        found = where.average[name]
        found = found if container == "dict" else found.get_value()
        assert found.codes == leaf.sharding
        assert_equal(found.exponents, NamedSharding(mesh, wanted[name]), leaf.ndim)
    assert_equal(where.count, NamedSharding(mesh, P()), 0)


def test_the_longest_name_wins_and_positions_in_a_chain_are_no_names(mesh):
    shared = {"a": {"w": put(mesh, (16, 8), "x")}, "w": put(mesh, (16, 8), None, "y")}
    state = state_shardings(optax.adam(0.1), shared)
    assert state[0].mu["a"]["w"] == shared["a"]["w"].sharding
    assert state[0].mu["w"] == shared["w"].sharding
    pair = (put(mesh, (16, 8), "x"), put(mesh, (16, 8), None, "y"))
    state = state_shardings(optax.chain(optax.sgd(0.1), optax.adam(0.1)), pair)
    assert state[1][0].mu == (pair[0].sharding, pair[1].sharding)


def test_any_container_and_a_lone_array_will_do(mesh):
    row, column = NamedSharding(mesh, P("x")), NamedSharding(mesh, P("y"))

    def spread(tree):
        place = lambda x: jax.device_put(  # noqa: E731
            np.zeros((4, 2) if x.ndim == 2 else (6,), np.float32),
            row if x.ndim == 2 else column,
        )
        return jax.tree.map(place, tree)

    trees = [*map(spread, containers().values()), put(mesh, (4, 2), "x")]
    trees.append(Module(None, put(mesh, (6,), "y")))  # as eqx.filter leaves it
    where = [state_shardings(trackers(), params) for params in trees]
    init = lambda trees: [trackers().init(params) for params in trees]  # noqa: E731
    states = jax.jit(init, out_shardings=where)(trees)
    for params, state in zip(trees, states, strict=True):
        for average in jp.get_importance(state):
            for leaf, own in zip(
                jax.tree.leaves(average), jax.tree.leaves(params), strict=True
            ):
                assert_equal(leaf.sharding, own.sharding, own.ndim)


def test_abstract_parameters_do_as_well(mesh):
    params = parameters(mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    for make in (OPTIMIZERS["trackers"], OPTIMIZERS["partition"]):
        tx = make(params)
        assert state_shardings(tx, abstract) == state_shardings(tx, params)


def test_parameters_on_one_device_have_their_state_there():
    device = jax.devices()[3]
    params = jax.device_put({"w": np.ones((4, 2), "f4"), "b": np.ones(3, "f4")}, device)
    where = state_shardings(optax.adafactor(0.1), params)
    assert set(jax.tree.leaves(where)) == {SingleDeviceSharding(device)}
    tx = trackers()
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
    assert {leaf.device for leaf in jax.tree.leaves(state)} == {device}


@pytest.mark.parametrize(
    ("leaf", "sentence"),
    [
        (np.ones(3), "on a mesh or on a device, but 'layer/w'"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "'layer/w' are on neither"),
        (1.5, "'layer/w' are on neither"),
    ],
)
def test_parameters_without_a_place_are_refused(leaf, sentence):
    with pytest.raises(ValueError, match=sentence):
        state_shardings(optax.adam(0.1), {"layer": {"w": leaf}, "b": jnp.ones(3)})


def test_half_on_a_mesh_and_nothing_at_all_are_refused(mesh):
    with pytest.raises(ValueError, match="one mesh, but 'b' are on a single"):
        state_shardings(
            optax.adam(0.1), {"w": put(mesh, (8, 8), "x"), "b": jnp.ones(3)}
        )
    with pytest.raises(ValueError, match="at least one parameter"):
        state_shardings(optax.adam(0.1), {})


def test_a_checkpoint_opens_onto_the_shardings_of_a_state(mesh, tmp_path):
    params, tx = parameters(mesh), trackers()
    where = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=where)(params)
    checkpoint.save(tmp_path, state, step=1, configuration={})
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        where,
    )
    restored = checkpoint.restore(tmp_path, target).state
    for leaf, old, wanted in zip(
        jax.tree.leaves(restored),
        jax.tree.leaves(state),
        jax.tree.leaves(where),
        strict=True,
    ):
        assert leaf.sharding == wanted
        np.testing.assert_array_equal(leaf, old)


class Linear(nnx.Module):
    """Two parameters on a mesh."""

    def __init__(self, mesh):
        self.kernel = nnx.Param(put(mesh, (16, 8), "x", "y"))
        self.bias = nnx.Param(put(mesh, (8,), "y"))


@pytest.mark.parametrize(
    ("mesh", "transform"),
    [
        pytest.param(
            AxisType.Auto, lambda f: f, id="Auto-eager", marks=pytest.mark.full
        ),
        pytest.param(AxisType.Auto, nnx.jit, id="Auto-jit"),
        pytest.param(AxisType.Explicit, nnx.jit, id="Explicit-jit"),
    ],
    indirect=["mesh"],
)
def test_importance_inside_an_nnx_optimizer_is_sharded(mesh, transform):
    model = Linear(mesh)

    def make(model):
        return nnx.Optimizer(model, trackers(), wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    with jax.set_mesh(mesh):
        optimizer = transform(make)(model)
        for _ in range(2):
            for average in jp.get_importance(optimizer):
                for name, own in (("kernel", model.kernel), ("bias", model.bias)):
                    leaf = average[name][...]
                    assert_equal(leaf.sharding, own[...].sharding, leaf.ndim)
            transform(step)(model, optimizer)
