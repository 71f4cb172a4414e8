"""Small tasks: a file of rows that grows, and tables that follow from it."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import small_models, small_tables, small_tasks

CASE = {"network": "mlp", "optimizer": "adam", "norm": "True", "sparsity": "0.9"}


def row(criterion, allocation, loss, calibration_loss, seed="0"):
    pair = {"criterion": criterion, "allocation": allocation, "seed": seed}
    losses = {"loss": str(loss), "calibration_loss": str(calibration_loss)}
    return CASE | pair | losses


def test_ranks_and_regrets_are_those_of_the_mean_over_seeds():
    rows = [
        row("magnitude", "layer", 1.0, 0),
        row("magnitude", "layer", 3.0, 0, seed="1"),
        row("magnitude", "global", 1.5, 0),
        row("magnitude", "global", 1.5, 0, seed="1"),
        row("obd", "erk", 2.0, 0),
        row("obd", "erk", 2.0, 0, seed="1"),
    ]
    assert small_tables.ranks_and_regrets(rows, "loss") == {
        ("magnitude", "layer"): (2, 0.5, 0.5),
        ("magnitude", "global"): (1, 0, 0),
        ("obd", "erk"): (2, 0.5, 0.5),
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_of_shifted_pictures_is_that_of_jax(stride):
    image_key, kernel_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(image_key, (3, 8, 8, 5))
    kernel = jax.random.normal(kernel_key, (3, 3, 5, 7))
    result = small_models._convolution(images, kernel, stride=stride)
    names = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=names
    )
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_measured_allocation_is_chosen_on_the_calibration_batch():
    rows = [row("obd", "layer", 1.0, 0.7), row("obd", "global", 2.0, 0.6)]
    *_, chosen = small_tables.with_measured(rows)
    assert (chosen["allocation"], chosen["loss"]) == ("measured", "2.0")


def test_a_network_is_in_the_file_with_all_its_rows_or_with_none(tmp_path):
    file = tmp_path / "rows.csv"
    small_tasks._append(file, [{"network": "mlp", "loss": 1.0}])
    # A run that ends between two rows, whose network would be taken for done.
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        small_tasks._append(file, [{"network": "cnn"}, {"network": "cnn", "extra": 1}])
    small_tasks._append(file, [{"network": "gpt", "loss": 2.0}])
    assert [row["network"] for row in small_tables.read(file)] == ["mlp", "gpt"]


@pytest.mark.full
def test_rows_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    config = small_tasks.Config(
        tmp_path / "rows.csv",
        networks=("regression",),
        optimizers=("adam",),
        sparsities=(0.9,),
        seeds=2,
        steps=4,
        retraining=2,
    )
    small_tasks.main(config)
    rows = small_tables.read(config.out)
    assert len(rows) == 2 * 5 * 3 * 2  # norm, criteria, allocations, seeds
    monkeypatch.setattr(small_tasks, "make_rows", lambda *_: pytest.fail("made again"))
    small_tasks.main(config)
    assert small_tables.read(config.out) == rows
    assert "preconditioned_magnitude | measured" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="seeds was 2 and is 1"):
        small_tasks.main(dataclasses.replace(config, seeds=1))
