"""One flag places a run; where the arrays live changes no number that it reports."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from experiments import gpt
from experiments.harness import checkpoint, device_mesh, training
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays import processes
from tests.support import tiny_gpt
from tests.support.tiny_gpt import (
    BATCHES,
    HELD_STEP,
    MODEL,
    RETRAIN,
    SPARSITY,
    STEPS,
    WATCHED_STEP,
)

MESHES = [
    pytest.param("data=4,model=2", marks=pytest.mark.full),
    pytest.param("data=8", marks=pytest.mark.full),
    pytest.param("fsdp=8", marks=pytest.mark.full),
    pytest.param("fsdp=4,model=2", marks=pytest.mark.slow),
    pytest.param("data=2,fsdp=2,model=2", marks=pytest.mark.slow),
]


@functools.cache
def run(mesh):
    """The tiny run on a mesh, and how often each of its two steps was compiled."""
    tiny_gpt.traces.clear()
    training._compiled.cache_clear()  # of what another test compiled
    result = tiny_gpt.run(device_mesh.make_mesh(mesh, BATCHES.batch_size))
    compiled = [
        training._compiled(step, training._shardings(state))._cache_size()
        for step, state in [
            (WATCHED_STEP, result.trained),
            (HELD_STEP, result.retrained),
        ]
        if mesh != "data=1"
    ]
    return result, dict(tiny_gpt.traces), compiled


@pytest.mark.parametrize("mesh", MESHES)
def test_every_layout_trains_prunes_and_retrains_to_the_same_losses(mesh):
    result, expected = run(mesh)[0], run("data=1")[0]
    assert len(expected.losses) == STEPS + RETRAIN + 3
    assert expected.losses[0] - expected.losses[STEPS] > 0.01
    np.testing.assert_allclose(result.losses, expected.losses, rtol=0, atol=1e-5)
    for masks in (result.masks, expected.masks):
        kept = np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(masks)])
        assert kept.size - kept.sum() == round(SPARSITY * kept.size)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_step_is_compiled_once_and_every_state_keeps_the_layout(mesh):
    result, traces, compiled = run(mesh)
    assert (traces, compiled) == ({"watched": 1, "held": 1}, [1, 1])
    place = device_mesh.make_mesh(mesh, BATCHES.batch_size)
    for state in (result.trained, result.retrained):
        shardings = device_mesh.shardings(state.params, place)
        assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == shardings
    shardings = jp.tree.named_leaves(
        device_mesh.shardings(result.trained.params, place)
    )
    for tree in (result.importance.weight, result.importance.square, result.masks):
        for name, leaf in jp.tree.named_leaves(tree).items():
            if not jp.tree.is_excluded(leaf):
                same = leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)
                assert same, (name, leaf.sharding)


@pytest.mark.full
def test_a_step_on_a_mesh_takes_over_the_memory_of_the_state():
    mesh = device_mesh.make_mesh("fsdp=8", 8)  # compiled above
    state = tiny_gpt.start(mesh)
    step = training._compiled(WATCHED_STEP, training._shardings(state))
    step(state, *training._put(BATCHES(0), mesh), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data=1", "fsdp=8"])
def test_a_checkpoint_of_one_layout_opens_on_another_and_goes_on(tmp_path, mesh):
    def train(mesh, steps):
        place = device_mesh.make_mesh(mesh, BATCHES.batch_size)
        state = tiny_gpt.start(place)
        losses = []
        state = tiny_gpt.fit(
            state, WATCHED_STEP, place, steps, losses, directory=tmp_path
        )
        return state, losses

    before, _ = train("data=4,model=2", 4)
    digest = tiny_gpt.digest(before)
    place = device_mesh.make_mesh(mesh, BATCHES.batch_size)
    target = tiny_gpt.start(place)
    opened = checkpoint.restore(tmp_path, target).state
    assert tiny_gpt.digest(opened) == digest
    shardings = [leaf.sharding for leaf in jax.tree.leaves(opened)]
    assert shardings == [leaf.sharding for leaf in jax.tree.leaves(target)]
    _, losses = train(mesh, STEPS)
    expected = run("data=1")[0]
    np.testing.assert_allclose(losses, expected.losses[4:STEPS], rtol=0, atol=1e-5)


def specs(config, mesh):
    shapes = jax.eval_shape(lambda: LanguageModel(config).init(0))
    tree = device_mesh.shardings(shapes, device_mesh.make_mesh(mesh, 8))
    named = {name: s.spec for name, s in jp.tree.named_leaves(tree).items()}
    return {re.sub(r"blocks/\d/", "", name): spec for name, spec in named.items()}


UNTIED = gpt.GPTConfig(
    vocab_size=16, context=8, layers=1, heads=2, width=16, bias=True, tie_weights=False
)


def test_the_axes_of_tensor_parallelism_are_those_of_megatron():
    assert specs(UNTIED, "data=4,model=2") == {
        "token_embedding/embedding": P("model"),
        "position_embedding/embedding": P(),
        "norm_attention/scale": P(),
        "norm_attention/bias": P(),
        "attention/qkv/kernel": P(None, "model"),
        "attention/qkv/bias": P("model"),
        "attention/out/kernel": P("model"),
        "attention/out/bias": P(),
        "norm_mlp/scale": P(),
        "norm_mlp/bias": P(),
        "mlp/up/kernel": P(None, "model"),
        "mlp/up/bias": P("model"),
        "mlp/down/kernel": P("model"),
        "mlp/down/bias": P(),
        "norm/scale": P(),
        "norm/bias": P(),
        "head/kernel": P(None, "model"),
    }


def test_fsdp_splits_the_longest_axis_that_is_left():
    layout = specs(UNTIED, "fsdp=4,model=2")
    assert layout["mlp/up/kernel"] == P("fsdp", "model")
    assert layout["mlp/down/kernel"] == P("model", "fsdp")
    assert layout["position_embedding/embedding"] == P(None, "fsdp")
    assert layout["norm/scale"] == P("fsdp")
    assert specs(UNTIED, "fsdp=4")["mlp/up/kernel"] == P(None, "fsdp")


def test_an_axis_that_does_not_divide_stays_whole():
    odd = gpt.GPTConfig(vocab_size=15, context=8, layers=1, heads=2, width=18)
    layout = specs(odd, "fsdp=4,model=2")
    assert layout["token_embedding/embedding"] == P()
    assert layout["attention/out/kernel"] == P("model")
    assert layout["mlp/up/kernel"] == P(None, "model")
    assert specs(odd, "fsdp=4")["mlp/up/kernel"] == P(None, "fsdp")


def test_an_axis_that_would_split_nothing_is_refused():
    for mesh in ("model=5", "fsdp=5"):
        with pytest.raises(ValueError, match=f"axis {mesh} must divide an axis of a"):
            device_mesh.shardings(
                jax.eval_shape(lambda: MODEL.init(0)), device_mesh.make_mesh(mesh, 5)
            )


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=", "data=0", "data=-1", "data=two", "batch=8", "data=2,data=2",
     "data=2 model=2", "data=2,", "model=2.0", "Data=2"],
)  # fmt: skip
def test_what_is_no_mesh_is_refused_and_told_how_it_is_written(text):
    with pytest.raises(ValueError, match=r"--mesh must name .* as in data=4,model=2"):
        device_mesh.make_mesh(text, 8)


def test_a_mesh_that_does_not_fit_is_refused_by_its_numbers():
    with pytest.raises(ValueError, match=r"data=8,model=2 needs 16 devices, got 8"):
        device_mesh.make_mesh("data=8,model=2", 8)
    with pytest.raises(ValueError, match=r"over 8 devices, got batch_size=12; give a"):
        device_mesh.make_mesh("data=4,fsdp=2", 12)
    assert device_mesh.make_mesh("data=2,model=4", 2).shape == {"data": 2, "model": 4}
    assert device_mesh.make_mesh("model=4,data=2", 2).axis_names == ("model", "data")


def test_without_the_flag_every_device_that_divides_the_batch_is_used():
    assert device_mesh.make_mesh(None, 12).shape == {"data": 6}
    assert device_mesh.make_mesh(None, 8).shape == {"data": 8}
    assert device_mesh.make_mesh(None, 1) is None
    assert device_mesh.make_mesh("data=1", 1) is None


@pytest.mark.parametrize("mesh", ["data=2,fsdp=3", "data=6", "model=2"])
def test_a_batch_is_split_by_the_axes_that_split_batches(mesh):
    place = device_mesh.make_mesh(mesh, 12)
    batch = device_mesh.put(np.arange(24).reshape(12, 2), device_mesh.of_batch(place))
    rows = 12 if mesh == "model=2" else 2
    assert {shard.data.shape for shard in batch.addressable_shards} == {(rows, 2)}
    np.testing.assert_array_equal(batch, np.arange(24).reshape(12, 2))
    size = device_mesh.batch_size(64, place)
    assert size == (64 if mesh == "model=2" else 66)
    assert device_mesh.batch_size(64, None) == 64


def test_a_sharded_array_is_fetched_whole():
    mesh = device_mesh.make_mesh("fsdp=8", 8)
    tree = {"a": jnp.arange(16.0), "b": jnp.float32(3)}
    placed = device_mesh.put(
        tree, {"a": device_mesh.of_batch(mesh), "b": device_mesh.repeated(mesh)}
    )
    fetched = processes.fetch(placed)
    assert isinstance(fetched["a"], np.ndarray)
    chex.assert_trees_all_equal(fetched, tree)
