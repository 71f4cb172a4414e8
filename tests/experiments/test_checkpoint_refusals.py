"""What the checkpoints refuse, before anything is written."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import checkpoint, manifest
from tests.support.checkpoints import CONFIGURATION, save, small_state, snapshot


def test_saving_a_step_again_or_an_earlier_one_is_refused(tmp_path):
    save(tmp_path, 5)
    before = snapshot(tmp_path)
    for step in (5, 4):
        with pytest.raises(ValueError, match=r"steps must grow .* another directory"):
            save(tmp_path, step)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "0", "05", "step_5"])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for act in (
        lambda: save(tmp_path, 1),
        lambda: checkpoint.latest(tmp_path),
        lambda: checkpoint.restore(tmp_path, small_state()),
    ):
        with pytest.raises(ValueError, match=rf"checkpoints only, .*'{name}'; choose"):
            act()
    assert os.listdir(tmp_path) == [name]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ValueError, match="must be a directory of checkpoints, got a file"
    ):
        save(tmp_path / "file", 1)


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_version_is_refused(tmp_path, monkeypatch, version):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", version)
        save(tmp_path, 1)
    for act in (lambda: save(tmp_path, 1), lambda: checkpoint.latest(tmp_path)):
        with pytest.raises(
            ValueError, match=rf"version 1, got .* version {version}; read it with the"
        ):
            act()


def test_another_model_is_refused_naming_every_leaf_that_differs(tmp_path):
    save(tmp_path, 1)
    target = {
        "params": {"w": jnp.zeros((3, 5)), "b": jnp.zeros(4), "v": jnp.zeros(())},
    }
    with pytest.raises(ValueError, match="must have the leaves of the target") as error:
        checkpoint.restore(tmp_path, target)
    for part in (
        "'params/w' is float32(3, 4) in it and float32(3, 5) in the target",
        "'params/b' is bfloat16(4,) in it and float32(4,) in the target",
        "'params/v' is absent in it and float32() in the target",
        "'step' is int32() in it and absent in the target",
    ):
        assert part in str(error.value)
    many = {str(n): jnp.zeros(1) for n in range(20)}
    with pytest.raises(ValueError, match="and 15 more; build the model"):
        checkpoint.restore(tmp_path, many)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": {"a": {"n": 3}}}, TypeError, "got int at 'a/n'; wrap it in jnp"),
        ({"state": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}, ValueError, "two"),
        ({"configuration": {"f": print}}, TypeError, "must be JSON-able"),
        ({"configuration": {"f": np.nan}}, ValueError, "JSON-able without NaN"),
        ({"step": -1}, ValueError, "step >= 0"),
        ({"keep": 0}, ValueError, "keep >= 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path, change, error, message
):
    arguments = {"state": small_state(), "step": 1, "configuration": {}} | change
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "run", arguments.pop("state"), **arguments)
    assert not (tmp_path / "run").exists()


def test_typed_random_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"at 'key'; store jax.random.key_data\(key\)"):
        checkpoint.save(tmp_path, {"key": jax.random.key(0)}, step=1, configuration={})


@pytest.mark.parametrize("step", [3.0, "3", None, np.float32(3), jnp.ones(2, int)])
def test_a_step_that_is_no_integer_is_refused_before_anything_is_written(
    tmp_path, step
):
    with pytest.raises(TypeError, match="needs an integer step, got"):
        checkpoint.save(tmp_path, small_state(), step=step, configuration=CONFIGURATION)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_tensorstore_has_not_is_refused_before_anything_is_written(
    tmp_path,
):
    state = {"w": jnp.zeros(4, jnp.uint4)}
    with pytest.raises(TypeError, match=r"no uint4.*at 'w'; cast it to uint8"):
        checkpoint.save(tmp_path, state, step=1, configuration={})
    assert not list(tmp_path.iterdir())
