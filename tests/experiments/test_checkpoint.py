"""A checkpoint is whole or not taken for one, and comes back bit for bit."""

import os
import signal
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.harness import checkpoint
from tests.support import forked
from tests.support.checkpoints import (
    CONFIGURATION,
    abstract,
    save,
    save_until_killed,
    small_state,
)
from tests.support.compilations import compiled

pytestmark = pytest.mark.jax_api


def test_every_container_and_dtype_comes_back_bit_for_bit(tmp_path):
    class Pair(typing.NamedTuple):
        left: typing.Any
        right: typing.Any

    params = nnx.state(nnx.jit(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))(), nnx.Param)
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    state = Pair(
        params,
        (
            optimizer.init(params),
            {"mask": jnp.array([True, False]), "none": None, "a/b": jnp.ones(2)},
            [optax.MaskedNode(), jnp.arange(5, dtype=jnp.uint8), jnp.int32(3)],
            {"bf16": jnp.asarray([1.1, -0.0, jnp.nan, jnp.inf], jnp.bfloat16)},
            (np.arange(4), np.float64(0.1), jnp.zeros((0, 2)), np.zeros((3, 0))),
        ),
    )
    checkpoint.save(tmp_path, state, step=3, configuration={})
    target = jax.tree.map(
        lambda x: abstract(x) if isinstance(x, jax.Array) else x, state
    )
    restored = checkpoint.restore(tmp_path, target)
    assert restored.step == 3
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for new, old in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True
    ):
        assert new.dtype == old.dtype
        assert isinstance(new, jax.Array) == isinstance(old, jax.Array)
        np.testing.assert_array_equal(
            np.asarray(new).reshape(-1).view(np.uint8),
            np.asarray(old).reshape(-1).view(np.uint8),
        )


def test_a_tree_that_is_one_array_or_has_no_elements_comes_back(tmp_path):
    for step, state in enumerate([jnp.arange(3), {}, {"empty": jnp.zeros((0, 2))}]):
        checkpoint.save(tmp_path, state, step=step, configuration={})
        restored = checkpoint.restore(tmp_path, abstract(state)).state
        chex.assert_trees_all_equal(restored, state)


def test_four_devices_save_and_two_load(tmp_path):
    def sharding(count, axis):
        mesh = jax.make_mesh(
            (count,), ("x",), (AxisType.Auto,), devices=jax.devices()[:count]
        )
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "x"))

    value = np.arange(32, dtype=np.float32).reshape(4, 8)
    state = {"w": jax.device_put(value, sharding(4, 0))}
    checkpoint.save(tmp_path, state, step=1, configuration={})
    target = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding(2, 1))
    restored = checkpoint.restore(tmp_path, {"w": target}).state["w"]
    assert restored.sharding == target.sharding
    np.testing.assert_array_equal(restored, value)
    alone = checkpoint.restore(tmp_path, abstract(state)).state["w"]
    assert len(alone.sharding.device_set) == 1


def test_a_save_of_small_repeated_leaves_compiles_nothing(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    value = np.arange(32, dtype=np.float32).reshape(4, 8)
    state = {"w": jax.device_put(value, NamedSharding(mesh, PartitionSpec()))}
    with compiled() as programs:
        checkpoint.save(tmp_path, state, step=1, configuration={})
    assert not programs
    restored = checkpoint.restore(tmp_path, abstract(state)).state["w"]
    np.testing.assert_array_equal(restored, value)


def test_the_last_two_are_kept_and_nothing_else_stays(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_a_missing_or_empty_folder_holds_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.restore(folder, small_state()) is None
    assert not (tmp_path / "missing").exists()


def test_a_save_that_was_cut_is_not_looked_at(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert checkpoint.restore(tmp_path, abstract(small_state())).step == 1
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_another_configuration_or_model_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="seed was 0 and is 1; give the old values"):
        checkpoint.restore(
            tmp_path, small_state(), configuration={**CONFIGURATION, "seed": 1}
        )
    with pytest.raises(KeyError, match="Failed to load"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros((5, 5))})


def test_orbax_stays_quiet(tmp_path, capfd):
    save(tmp_path, 1)
    checkpoint.restore(tmp_path, small_state())
    assert capfd.readouterr().err == ""


@pytest.mark.full
@pytest.mark.parametrize("moment", ["0.03", "0.3", "commit"])
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, moment):
    folder, log = tmp_path / "saved", tmp_path / "log"
    child = forked.start(save_until_killed, folder, moment, log=log)
    assert forked.code(child) == -signal.SIGKILL, log.read_text()
    target = {str(n): jnp.zeros((64, 64)) for n in range(40)}
    restored = checkpoint.restore(folder, target)
    for n in range(40):
        np.testing.assert_array_equal(restored.state[str(n)], float(n))
    checkpoint.save(folder, target, step=restored.step + 1, configuration={})
    assert not [name for name in os.listdir(folder) if not name.isdecimal()]
