"""A directory holds the cells of one table, and shows no other's."""

import dataclasses
import json
import os

import numpy as np
import pytest

from benchmarks import (
    draws,
    jax_pruning,
    own_text,
    quality_and_seconds,
    real_model,
    shrink_while_training,
    smaller_model,
    token_weights,
)

TEXTS = ("shakespeare", "technical", "news")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A table of two draws whose processes are only noted."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in TEXTS:
        np.save(texts / f"held-out-{name}.npy", np.zeros((4, 8), np.int32))
    np.save(texts / "calibration-mixed50-128.npy", np.zeros((8, 8), np.int32))
    line = {"perplexities": {"after": dict.fromkeys(TEXTS, 2.0)}}
    monkeypatch.setattr(real_model, "json_line", lambda *_: json.dumps(line))
    return token_weights.Config(
        tmp_path / "model",
        texts,
        tmp_path / "out",
        draws=(0, 1),
        calibrated=4,
        patterns=("0.5",),
        methods=("sparsegpt", "torch-sparsegpt"),
        relative=(True,),
    )


def test_a_table_goes_on_and_another_is_refused(config, capsys):
    for _ in range(2):
        token_weights.main(config)
        rows = capsys.readouterr().out.splitlines()[2:]
        assert [row.split(" | ")[1:3] for row in rows] == [
            ["sparsegpt", "relative"],
            ["torch-sparsegpt", "plain"],
        ]
        assert all(row.endswith("| 2 |") for row in rows)
    for other in ({"sequences": 4}, {"calibrated": 2}, {"model": config.texts}):
        with pytest.raises(ValueError, match="belongs to another job"):
            draws.run_missing(
                token_weights.Config(**{**vars(config), **other}), lambda _: []
            )
    with pytest.raises(ValueError, match="table was 'token_weights'"):
        real_model.main(real_model.Config(config.model, config.texts, config.out))


def test_a_cell_that_was_cut_off_is_no_cell(config, monkeypatch, capsys):
    line = json.dumps({"perplexities": dict.fromkeys(TEXTS, 2.0)})
    monkeypatch.setattr(smaller_model, "json_line", lambda *_: line)
    places = config.model, config.texts, config.out
    changes = {"draws": (0,), "removed": ("ffn25",), "methods": ("flap",)}
    replace = os.replace

    def stopped(partial, place):
        if place.name != "table.json":
            raise KeyboardInterrupt
        replace(partial, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            smaller_model.main(smaller_model.Config(*places, **changes))
    assert [path.name for path in config.out.iterdir()] == ["table.json"]
    smaller_model.main(smaller_model.Config(*places, **changes))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| dense", "none"],
        ["| ffn25", "flap"],
    ]
    with pytest.raises(ValueError, match="sequences was 8 and is 4"):
        smaller_model.main(smaller_model.Config(*places, **changes, sequences=4))


def test_energy_is_a_column_only_where_it_was_measured():
    run = {"nats": 1.25, "seconds": 3.0, "rest": 4.0, "parameters": 1234.0}
    rows = shrink_while_training.loss_table({"dense": [run]}).splitlines()
    assert rows[2] == "| dense | 1.250 | 3.0 | 4.0 | 1,234 |"
    runs = [{**run, "watt-hours": 0.5}] * 2
    rows = shrink_while_training.loss_table({"dense": runs}).splitlines()
    assert rows[2] == "| dense | 1.250 ± 0.000 | 3.0 | 4.0 | 1,234 | 0.50 |"


def test_both_sides_are_told_how_many_threads(monkeypatch):
    calls = []

    class Done:
        stdout = "{}"

    def ran(command, env, **_):
        calls.append((command[3:], env["NPROC"], env["OMP_NUM_THREADS"]))
        return Done

    monkeypatch.setattr(real_model.subprocess, "run", ran)
    real_model.json_line(["benchmarks.jax_pruning", "m"], 1)
    real_model.json_line(["benchmarks.torch_pruning", "m"], 1)
    assert calls == [(["m"], "1", "1"), (["m", "--threads", "1"], "1", "1")]


@pytest.mark.parametrize(
    ("method", "option"),
    [("wanda", {"correction": 0.5}), ("magnitude", {"relative": True})],
)
def test_an_option_that_a_method_has_not_is_refused(tmp_path, method, option):
    with pytest.raises(ValueError, match=f"{method} has no {next(iter(option))}"):
        jax_pruning.main(
            jax_pruning.Config(tmp_path, method, tmp_path / "ids.npy", **option)
        )


def test_a_method_without_a_correction_is_refused_before_anything_is_written(config):
    asked = own_text.Config(config.model, config.texts, config.out, methods=("wanda",))
    with pytest.raises(
        ValueError, match="wanda has no correction; give --correction 0"
    ):
        own_text.main(asked)
    assert not config.out.exists()


def test_quality_is_drawn_against_seconds_a_point_a_method(tmp_path, capsys):
    folder = tmp_path / "cells"
    folder.mkdir()
    most = {"relative": "True", "correction": "0.5", "refine": "4"}
    for name, text, asked, seconds, value in (
        ("0.6_sparsegpt_plain_0", "0", {}, 100, 40.0),
        ("0.6_sparsegpt_plain_1", "1", {}, 200, 10.0),
        ("0.6_alps_both+refine4_0", "0-both", most, 900, 8.0),
        ("2of4_alps_plain_0", "0", {}, 5, 1.0),
    ):
        cell = {
            "config": {"calibration": f"x/{text}.npy", **asked},
            "perplexities": {"after": dict.fromkeys(TEXTS, value)},
            "seconds": {"prune": seconds},
        }
        (folder / f"{name}.json").write_text(json.dumps(cell))
    drawn = quality_and_seconds.Config((folder,), pattern="0.6", out=tmp_path / "x.svg")
    quality_and_seconds.main(drawn)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["draws"] for row in rows] == [2, 1]
    assert [row["seconds"] for row in rows] == [150, 900]
    assert [row["perplexity"] for row in rows] == pytest.approx([20, 8])
    text = drawn.out.read_text()
    assert ">SparseGPT<" in text
    assert ">ALPS: one size, correction 0.5, half own text, refined 4<" in text
    with pytest.raises(ValueError, match=r"no directory has a cell of 0\.9"):
        quality_and_seconds.main(dataclasses.replace(drawn, pattern="0.9"))
