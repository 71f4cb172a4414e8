"""A checkpoint is whole or not taken for one, and comes back bit for bit."""

import errno
import json
import logging
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

from experiments.harness import checkpoint, manifest
from jaxprune.files import atomic
from tests.support import forked
from tests.support.checkpoints import (
    CONFIGURATION,
    abstract,
    files,
    save,
    save_until_killed,
    small_state,
    snapshot,
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


def test_the_configuration_is_read_without_the_arrays(tmp_path):
    path = save(tmp_path, 5)
    newest = checkpoint.latest(tmp_path)
    assert newest == (5, {"seed": 0, "model": {"layers": [1, 2]}}, path, None)


def test_configurations_are_compared_field_by_field():
    saved = json.loads(json.dumps(CONFIGURATION))
    assert atomic.differences(saved, CONFIGURATION) == []
    current = {"seed": 1, "model": {"layers": (1, 2), "width": 8}}
    assert atomic.differences(saved, current) == [
        "seed was 0 and is 1",
        "model.width was 'absent' and is 8",
    ]


def test_the_last_n_are_kept_and_nothing_else_stays(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]
    checkpoint.save(tmp_path, small_state(), step=5, configuration={}, keep=1)
    assert os.listdir(tmp_path) == ["5"]


def test_a_missing_or_empty_folder_holds_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.latest(folder) is None
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint; give the"):
            checkpoint.restore(folder, small_state())
    assert not (tmp_path / "missing").exists()


def test_a_checkpoint_damaged_anywhere_is_passed_over_for_an_older_one(
    tmp_path, caplog
):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    random = np.random.default_rng(0)
    for file in files(path):
        content = file.read_bytes()
        places = {0, len(content) // 2, len(content) - 1}
        places |= set(random.integers(0, max(len(content), 1), 4).tolist())
        damages = [content[:n] for n in places if 0 <= n < len(content)]
        damages += [
            content[:n] + bytes([content[n] ^ 0x10]) + content[n + 1 :]
            for n in places
            if 0 <= n < len(content)
        ]
        for damaged in damages:
            file.write_bytes(damaged)
            assert checkpoint.latest(tmp_path).step == 1, (file, len(damaged))
        file.unlink()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            restored = checkpoint.restore(tmp_path, abstract(small_state()))
        assert "using '1'" in caplog.text
        assert file.name in caplog.text
        chex.assert_trees_all_equal(restored.state, small_state(1.0))
        file.write_bytes(content)
    assert checkpoint.latest(tmp_path).step == 2


@pytest.mark.full
def test_a_checkpoint_cut_or_changed_at_any_byte_is_not_taken_for_whole(tmp_path):
    path = save(tmp_path, 1)
    meaning, accepted = manifest.verify(path), []

    def check(name, *damage):
        try:
            body = manifest.verify(path)
        except manifest.Broken:
            return
        # White space of the manifest may change; what it says may not.
        if name != "checkpoint.json" or body != meaning:
            accepted.append((name, *damage))

    for file in files(path):
        content = file.read_bytes()
        # The manifest is parsed, so each byte counts; the others' sizes and digests are
        # compared, and every fifth byte and the last tell what they leave out.
        stride = 1 if file.name == "checkpoint.json" else 5
        with open(file, "r+b", buffering=0) as opened:
            places = range(len(content) - 1, -1, -stride)
            for n in places:
                os.pwrite(opened.fileno(), bytes([content[n] ^ 1 << n % 8]), n)
                check(file.name, "changed", n)
                os.pwrite(opened.fileno(), content[n : n + 1], n)
            for n in places:
                opened.truncate(n)
                check(file.name, "cut", n)
            os.pwrite(opened.fileno(), content, 0)
    assert manifest.verify(path) == meaning
    assert accepted == []


def test_a_save_that_was_cut_anywhere_is_not_looked_at(tmp_path):
    save(tmp_path, 1)
    partial = save(tmp_path, 2).rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert checkpoint.latest(tmp_path).step == 1
    for damaged in files(partial):
        damaged.unlink()
        assert checkpoint.latest(tmp_path).step == 1
    # orbax would itself replace the one of this step alone.
    (tmp_path / "7.orbax-checkpoint-tmp-123" / "d").mkdir(parents=True)
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_where_no_checkpoint_is_whole_the_reasons_are_given(tmp_path):
    path = save(tmp_path, 1)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .* is whole \('1' has a damaged "
        r"checkpoint.json\); bring .* or remove the directory",
    ):
        checkpoint.restore(tmp_path, small_state())


def test_where_the_first_save_was_cut_there_is_no_checkpoint(tmp_path):
    (save(tmp_path, 1) / "checkpoint.json").unlink()
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 1)
    assert checkpoint.latest(tmp_path).step == 1


def test_a_damaged_newest_checkpoint_is_replaced(tmp_path):
    save(tmp_path, 1)
    for step in (2, 3):
        path = checkpoint.save(
            tmp_path, small_state(0.0), step=step, configuration={}, keep=3
        )
        (path / "checkpoint.json").write_text("{")
    assert checkpoint.latest(tmp_path).step == 1
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    restored = checkpoint.restore(tmp_path, abstract(small_state()))
    chex.assert_trees_all_equal(restored.state, small_state(2.0))


def test_a_full_disk_is_one_error_and_leaves_the_earlier_checkpoint(
    tmp_path, monkeypatch
):
    save(tmp_path, 1)
    before = snapshot(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_tensorstore(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: d/1\n[source ...]")

    for place, failure in [
        ("_save_arrays", full),
        ("_save_arrays", full_for_tensorstore),
        ("manifest.write", full),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(f"experiments.harness.checkpoint.{place}", failure)
            with pytest.raises(
                OSError, match=r"step 2 could not .*No space left on device\); free"
            ) as error:
                save(tmp_path, 2)
        assert error.value.errno == errno.ENOSPC
        assert snapshot(tmp_path) == before
        assert len(os.listdir(tmp_path)) == 1


def test_another_failure_of_a_save_is_told_in_its_first_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("odd\nand long")

    monkeypatch.setattr(checkpoint, "_save_arrays", fail)
    with pytest.raises(OSError, match=r"\(odd\); free") as error:
        save(tmp_path, 1)
    assert error.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []


def test_orbax_stays_quiet(tmp_path, capfd, caplog):
    # Of this logger alone: what else writes to a handler of the root is not meant.
    with caplog.at_level(logging.DEBUG, logger="absl"):
        save(tmp_path, 1)
        checkpoint.restore(tmp_path, small_state())
    assert not [r for r in caplog.records if "orbax" in r.pathname]
    assert capfd.readouterr().err == ""


@pytest.mark.full
@pytest.mark.parametrize("moment", ["manifest", "0.03", "commit", "removal"])
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, moment):
    folder, log = tmp_path / "saved", tmp_path / "log"
    child = forked.start(save_until_killed, folder, moment, log=log)
    assert forked.code(child) == -signal.SIGKILL, log.read_text()
    target = {str(n): jnp.zeros((64, 64)) for n in range(40)}
    restored = checkpoint.restore(folder, target)
    for n in range(40):
        np.testing.assert_array_equal(restored.state[str(n)], float(n))
    step = restored.step + 1
    checkpoint.save(folder, target, step=step, configuration={}, keep=1)
    assert os.listdir(folder) == [str(step)]


@pytest.mark.parametrize(
    "number",
    [np.int64, np.array, jnp.int32, jnp.asarray],
    ids=lambda number: number.__name__,
)
def test_a_step_may_be_the_states_own_counter(tmp_path, number):
    path = checkpoint.save(
        tmp_path, small_state(), step=number(3), configuration=CONFIGURATION
    )
    newest = checkpoint.latest(tmp_path)
    assert (path.name, newest.step, type(newest.step)) == ("3", 3, int)


def test_a_manifest_that_is_a_directory_is_damage(tmp_path):
    save(tmp_path, 1)
    manifest_path = next(save(tmp_path, 2).glob("checkpoint.json"))
    manifest_path.unlink()
    manifest_path.mkdir()
    assert checkpoint.latest(tmp_path).step == 1
