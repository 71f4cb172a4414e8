"""Pruning while training: spans, exact counts, the tuned rate, resuming, refusals."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from experiments import prune_while_training
from experiments.harness import training
from experiments.prune_while_training import methods, report
from experiments.prune_while_training.config import Cell
from experiments.prune_while_training.run import Run
from tests.support.tiny_run import write_text

STEPS = 20
RATES = (1e-3, 3e-3)

# All read one run that trains.
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    write_text(folder / "tiny.txt")
    return prune_while_training.Config(
        out=folder / "out",
        preset="cpu",
        text=folder / "tiny.txt",
        methods=("gradual_preconditioned",),
        sparsities=(0.5,),
        tune_sparsity=0.5,
        steps=(STEPS,),
        learning_rates=RATES[:1],
        batch_size=2,
        eval_tokens=256,
    )


@pytest.fixture(scope="module")
def results(config):
    return json.loads(prune_while_training.main(config).read_text())


def without_seconds(results):
    return [{**cell, "seconds": None} for cell in results["cells"]]


@pytest.mark.parametrize("steps", [1000, 997])
def test_the_sparsity_rises_from_a_fifth_to_three_fifths(steps):
    span = methods.Span.of(0.8, steps)
    table = span.cubic().table()
    assert min(table) == round(0.2 * steps)
    assert max(table) == round(0.6 * steps) <= span.freeze < steps
    assert table[span.end] == 0.8
    assert np.all(np.diff(list(table.values())) > 0)


def test_the_average_of_weights_is_that_of_the_cubic():
    # The mean of 1 - (1 - t)^3 is 3/4: over 40 % of the steps, then 40 % at the end.
    span = methods.Span.of(0.9, 100_000)
    expected = 1 - 0.9 * (0.4 * 0.75 + 0.4)
    # Between two events the share stays: half an event's rise more is left.
    assert expected < span.average(100_000) < expected + 0.9 * 0.4 / 40


CHEAP = ("dense", "ste_magnitude")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CHEAP else pytest.mark.full)
        for name in methods.METHODS
    ],
)
def test_each_method_ends_with_exactly_as_many_zeros_as_asked_for(name):
    kernel = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    params = {"kernel": kernel}
    span = methods.Span.of(0.7, 20)
    tx = methods.METHODS[name](1e-2, span)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda leaf: leaf + 1, params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
    dense = name in (methods.DENSE, methods.DENSE_SMALL)
    zeros = np.sum(np.asarray(params["kernel"]) == 0)
    assert zeros == (0 if dense else round(0.7 * 128))


def test_a_cell_counts_exactly_and_is_watched_to_its_end(results):
    cells = {cell["method"]: cell for cell in results["cells"]}
    pruned = cells["gradual_preconditioned"]
    assert pruned["zeros"] == round(0.5 * pruned["size"])
    assert cells["dense"]["zeros"] == 0
    assert [point["step"] for point in pruned["curve"]] == [*range(0, STEPS + 1, 2)]
    assert pruned["curve"][2]["sparsity"] == 0
    assert pruned["curve"][-1]["sparsity"] == pruned["zeros"] / pruned["size"]
    assert pruned["curve"][-1]["overlap"] == 1  # it is final from 60 % on
    assert {point["overlap"] for point in cells["dense"]["curve"]} == {None}


def test_every_method_has_its_own_rate_and_the_control_too(config, results, tmp_path):
    shutil.copytree(config.out, tmp_path / "out")
    tuned = dataclasses.replace(config, out=tmp_path / "out", learning_rates=RATES)
    of = {}
    for cell in json.loads(prune_while_training.main(tuned).read_text())["cells"]:
        of.setdefault(cell["method"], {})[cell["learning_rate"]] = cell["loss"]
    assert {name: set(losses) for name, losses in of.items()} == {
        "dense": {*RATES},
        "gradual_preconditioned": {*RATES},
    }
    lines = csv.DictReader((tuned.out / "results.csv").read_text().splitlines())
    best = {name: min(losses, key=losses.get) for name, losses in of.items()}
    control = of["dense"][best["dense"]]
    for line in lines:
        rate, loss = float(line["learning_rate"]), float(line["loss"])
        assert (line["chosen"] == "True") == (rate == best[line["method"]])
        assert float(line["above"]) == loss - control


def test_the_page_names_the_methods(config, results):
    page = (config.out / "report.html").read_text()
    assert "gradual_preconditioned" in page
    assert page.count("<svg") == 2


def test_a_finished_run_trains_no_more(config, results, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    again = json.loads(prune_while_training.main(config).read_text())
    assert again["cells"] == results["cells"]


def test_a_rate_that_was_not_asked_for_is_not_taken(config, results):
    other = dataclasses.replace(config, learning_rates=(7e-3,))
    with pytest.raises(ValueError, match=r"not among 0\.007; add it to"):
        prune_while_training.main(other)


def test_a_killed_run_ends_with_the_same_bits(config, results, tmp_path, monkeypatch):
    again = dataclasses.replace(config, out=tmp_path)
    train, calls = training.train, []

    def dies_later(*args, **kwargs):
        calls.append(kwargs["steps"])
        if len(calls) == 15:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(training, "train", dies_later)
    with pytest.raises(KeyboardInterrupt):
        prune_while_training.main(again)
    assert not (tmp_path / "results.json").exists()
    assert len([*(tmp_path / "cells").glob("*")]) == 1
    resumed = json.loads(prune_while_training.main(again).read_text())
    assert without_seconds(resumed) == without_seconds(results)


def test_the_small_dense_model_has_about_the_average_of_weights(config):
    corpus = prune_while_training.run.load(config.data, text=config.text)
    run = Run(dataclasses.replace(config, preset="tiny"), corpus)
    width = run._width(Cell(methods.DENSE_SMALL, 0.9, 1000, 1e-3, 0))
    # 24 width^2 weights, of which the pruned run has 37 % on average.
    assert 0.9 < 24 * width**2 / (0.37 * 24 * 64**2) < 1.1


def cell(method, sparsity, rate, seed, loss, **more):
    whole = dict(steps=10, zeros=0, size=1, seconds=0.0)
    return (
        whole
        | dict(
            method=method, sparsity=sparsity, learning_rate=rate, seed=seed, loss=loss
        )
        | more
    )


def test_the_table_is_of_each_method_at_its_own_best_rate():
    # Of seed 1 at the other rates, and of another seed's lower loss, nothing is used.
    cells = [
        cell("dense", 0.0, 1e-3, 0, 2.0),
        cell("dense", 0.0, 2e-3, 0, 1.9),
        cell("dense", 0.0, 2e-3, 1, 1.7),
        cell("once", 0.9, 1e-3, 0, 2.1),
        cell("once", 0.9, 2e-3, 0, 2.2),
        cell("once", 0.9, 1e-3, 1, 2.0),
        cell("once", 0.9, 2e-3, 1, 0.1),
        cell("once", 0.8, 1e-3, 0, 1.95),
    ]
    config = {"tune_sparsity": 0.9}
    results = {"cells": cells, "config": config, "tune_seeds": [0]}
    chosen = [row for row in report.rows(results) if row["chosen"]]
    table = report._table(chosen, 10)
    (once,) = (row for row in table.rows if row[0] == "once")
    # 2.1 - 1.9 and 2.0 - 1.7; at 80 % 1.95 - 1.9.
    assert once[1:] == ["0.001", "+0.050 (1)", "+0.250 ± 0.071 (2)"]
    # The means of both seeds are 2.05 and 1.15; a rate with one of them is left out.
    more = [*cells, cell("once", 0.9, 3e-3, 0, 0.1)]
    chosen = report.rates(more, 0.9, (0, 1))
    assert [chosen[key] for key in chosen if "once" in key] == [2e-3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("methods", ("gradual_magnitude", "no_such")),
        ("sparsities", (1.0,)),
        ("sparsities", (float("nan"),)),
        ("sparsities", ()),
        ("steps", (9,)),
        ("seeds", (0, 0)),
        ("learning_rates", (0.0,)),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(
    config, field, value, tmp_path
):
    changed = dataclasses.replace(config, out=tmp_path / "new", **{field: value})
    with pytest.raises(ValueError, match=f"^{field} must") as caught:
        prune_while_training.main(changed)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_another_batch_size_in_the_same_folder_is_refused(config, results):
    changed = dataclasses.replace(config, batch_size=4)
    with pytest.raises(ValueError, match="batch_size was"):
        prune_while_training.main(changed)
