"""What a run writes down: metrics, results, costs, versions."""

import os

import pytest

from experiments.harness import records


def test_a_torn_last_line_is_dropped_and_later_steps_are_not_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = records.MetricsLog(path)
    for step in (10, 20, 30):
        log.write({"step": step}, seed=0)
    log.write({"step": 30}, seed=1)
    with open(path, "a") as file:
        file.write('{"seed": 1, "st')
    log = records.MetricsLog(path)
    log.resume(20, seed=0)
    log.write({"step": 30, "loss": 0.5}, seed=0)
    assert path.read_text().splitlines() == [
        '{"seed": 0, "step": 10}',
        '{"seed": 0, "step": 20}',
        '{"seed": 1, "step": 30}',
        '{"seed": 0, "step": 30, "loss": 0.5}',
    ]


def test_tensorboard_events_are_written_where_the_package_is(tmp_path):
    pytest.importorskip("tensorboardX")
    log = records.MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 2.0}, phase="train")
    log._events.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_energy_is_measured_offline_where_codecarbon_is(tmp_path, capfd, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    with records._energy("DEU") as energy:
        pass
    assert energy["energy_kwh"] > 0
    assert energy["co2_kg"] > 0
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert os.listdir(tmp_path) == []
