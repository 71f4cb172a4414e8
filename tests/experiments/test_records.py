"""What a run writes down: metrics, results, costs, versions."""

import errno
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import records


def test_a_torn_last_line_is_dropped_and_later_steps_are_not_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with records.MetricsLog(path, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write({"step": step}, seed=0)
        log.write({"step": 30}, seed=1)
    with open(path, "a") as file:
        file.write('{"seed": 1, "st')
    with records.MetricsLog(path, tensorboard=False) as log:
        log.resume(20, seed=0)
        log.write({"step": 30, "loss": np.float32(0.5)}, seed=0)
    assert path.read_text().splitlines() == [
        '{"seed": 0, "step": 10}',
        '{"seed": 0, "step": 20}',
        '{"seed": 1, "step": 30}',
        '{"seed": 0, "step": 30, "loss": 0.5}',
    ]


def test_tensorboard_events_are_written_where_the_package_is(tmp_path):
    pytest.importorskip("tensorboardX")
    with records.MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write({"step": 1, "loss": 2.0}, phase="train")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_metrics_line_that_does_not_fit_the_disk_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with records.MetricsLog(path, tensorboard=False) as log:
        log.write({"step": 1})
        file = log._file

        class Full:
            def write(self, line):
                return file.write(line[:3])

            def __getattr__(self, name):
                return getattr(file, name)

        log._file = Full()
        with pytest.raises(
            OSError, match=r"could not be written .* free space"
        ) as error:
            log.write({"step": 2})
        log._file = file
        assert error.value.errno == errno.ENOSPC
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
def test_a_full_device_is_one_clear_error():
    log = records.MetricsLog.__new__(records.MetricsLog)
    log.path, log._events = Path("/dev/full"), None
    with (
        open("/dev/full", "wb", buffering=0) as log._file,
        pytest.raises(OSError, match="No space left on device"),
    ):
        log.write({"step": 1})


def test_results_are_replaced_whole_or_left_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "results.json"
    records.write_json(path, {"n": np.int64(1), "w": jnp.arange(2), "f": np.float32(1)})
    assert json.loads(path.read_text()) == {"n": 1, "w": [0, 1], "f": 1.0}
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.* free space") as error:
        records.write_json(path, {"n": 2})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("value", [float("nan"), np.inf, np.array([1.0, np.nan])])
def test_nan_is_refused_by_its_place(tmp_path, value):
    with pytest.raises(ValueError, match=r"NaN or infinity at 'cells/1/loss"):
        records.write_json(tmp_path / "r.json", {"cells": [{}, {"loss": value}]})
    with (
        records.MetricsLog(tmp_path / "m.jsonl", tensorboard=False) as log,
        pytest.raises(ValueError, match="NaN or infinity at 'loss"),
    ):
        log.write({"loss": value})
    assert (tmp_path / "m.jsonl").read_bytes() == b""
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="JSON holds no set"):
        records.write_json(tmp_path / "r.json", {"a": {1}})


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another directory"):
        records.write_json(tmp_path / "file" / "results.json", {})
    with pytest.raises(OSError, match="choose another directory"):
        records.MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_a_phase_says_what_it_cost():
    with records.measure("train", seed=3) as phase:
        phase.tokens = 100
    record = phase.record()
    assert list(record) == [
        "name", "seed", "seconds", "peak_memory_bytes", "energy_kwh", "co2_kg",
        "share", "tokens_per_second",
    ]  # fmt: skip
    assert (record["name"], record["seed"]) == ("train", 3)
    assert record["tokens_per_second"] == 100 / record["seconds"]
    assert 10**7 < record["peak_memory_bytes"] < 10**12
    assert record["energy_kwh"] is None


def test_energy_is_measured_offline_where_codecarbon_is(tmp_path, capfd, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    with records.measure("train", country="DEU") as phase:
        pass
    assert phase.energy_kwh > 0
    assert phase.co2_kg > 0
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert os.listdir(tmp_path) == []


def test_versions_and_device_are_told():
    assert records.versions()["jax"] == jax.__version__
    assert records.versions()["python"].startswith("3.")
    assert records.device().startswith("8 x cpu (")
