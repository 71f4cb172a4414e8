"""The report shows the numbers of the results, on a page that loads nothing."""

import csv
import html.parser
import re

import numpy as np
import pytest

from experiments.report import curves, figures, page, sweep


def results(smoke=False):
    """A sweep of two seeds whose losses nobody measured."""
    seeds = []
    for number, shift in enumerate((0.0, 0.25)):
        cells = [
            {
                "criterion": criterion,
                "allocation": "global",
                "sparsity": sparsity,
                "achieved": sparsity,
                "loss_pruned": 2 + shift + loss,
                "loss_retrained": 1.5 + shift + loss / 2 if sparsity == 0.5 else None,
                "sparsity_by_leaf": {"a/kernel": sparsity, "b/kernel": 1.0},
            }
            for criterion, losses in (("one", (0.01, 0.5)), ("<two>", (0.75, 1.0)))
            for sparsity, loss in zip((0.5, 0.75), losses, strict=True)
        ]
        seeds.append(
            {
                "seed": number,
                "start": None,
                "dense": {"steps": 40, "loss": 2.0 + shift},
                "control": {"steps": 50, "loss": 1.5 + shift},
                "curve": [
                    {"step": 20, "loss": 3.0, "validation_loss": None},
                    {"step": 40, "loss": 2.0, "validation_loss": 2.0},
                ],
                "cells": cells,
                "samples": [{"label": "dense", "text": "to <b>be</b>"}],
            }
        )
    phase = {"name": "train", "seconds": 90.0, "tokens_per_second": 10.0}
    phase |= {"peak_memory_bytes": None, "energy_kwh": None, "co2_kg": None}
    return {
        "name": "scaled_down_llm",
        "command": "python -m experiments.scaled_down_llm",
        "config": {"smoke": smoke},
        "versions": {"jax": "0"},
        "device": "cpu",
        "finished": "now",
        "model": {"parameters": 10, "prunable": 8, "nats_by_frequency": 3.0},
        "seeds": seeds,
        "phases": [phase],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    content = results()
    text = page.write(content, folder, sweep.report(content))
    return folder, text, (folder / "report.html").read_text()


def test_differences_are_to_the_reference_of_the_same_seed():
    pruned = {c.criterion: c for c in curves.curves(results(), "pruned")}
    np.testing.assert_allclose(pruned["one"].above, [[0.01, 0.5]] * 2, atol=1e-12)
    retrained = {c.criterion: c for c in curves.curves(results(), "retrained")}
    np.testing.assert_allclose(retrained["<two>"].above, [[0.375]] * 2, atol=1e-12)


def test_reach_stops_at_the_first_sparsity_over_the_limit():
    above = np.ma.masked_invalid([[0.0, 0.02, 0.0], [0.01, np.nan, 0.0]])
    curve = curves.Curve(
        "a", "global", np.array([0.1, 0.2, 0.3]), above, np.zeros((2, 1))
    )
    assert curve.reach(0.015) == 0.1
    assert curve.reach(0.03) == 0.3
    assert curve.reach(0.001) is None


def test_the_headline_is_computed_from_the_numbers():
    retrained, pruned = sweep.report(results()).lead
    assert "one (global) stayed within 0.015 nats of the dense control" in retrained
    assert "up to 50\N{NO-BREAK SPACE}% sparsity (mean of 2 seeds)" in pruned
    assert sweep.report(results(smoke=True)).lead[0].startswith("Not trained")


def test_the_csv_has_one_row_for_each_cell_of_each_seed(written):
    with open(written[0] / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["criterion"], r["sparsity"]) for r in rows] == [
        (seed, name, sparsity)
        for seed in "01"
        for name in ("one", "<two>")
        for sparsity in ("0.5", "0.75")
    ]
    assert rows[0]["loss_pruned"] == "2.01"
    assert rows[4]["control_loss"] == "1.75"
    assert rows[1]["loss_retrained"] == ""


def test_tables_have_means_and_spreads(written):
    text = written[1]
    assert "2.135 ± 0.177 (+0.010 ± 0.000)" in text
    assert re.search(r"one +global +50.% +50.%", text)


def test_the_page_loads_nothing_and_closes_what_it_opens(written):
    open_tags, void = [], {"meta", "img", "br"}

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                assert name not in ("src", "href") or value[:1] in ("#", "d")
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(written[2])
    assert not open_tags
    assert "<script" not in written[2]


def test_text_is_escaped_and_ids_are_unique(written):
    assert "to &lt;b&gt;be&lt;/b&gt;" in written[2]
    ids = re.findall(r'\sid="([^"]+)"', written[2])
    assert len(ids) == len({*ids})


def test_the_same_results_give_the_same_bytes(written, tmp_path):
    content = results()
    page.write(content, tmp_path, sweep.report(content))
    assert (tmp_path / "report.html").read_text() == written[2]


def test_lines_are_means_over_the_seeds_and_bands_their_range():
    y = np.ma.masked_invalid([[0.0, 0.2], [0.1, np.nan]])
    panel = figures.Panel("x", {"a": ([10, 20], y)}, {"dense": 0.0})
    (axes,) = figures.draw([panel], scale="nats").axes
    line = next(line for line in axes.lines if line.get_label() == "a")
    np.testing.assert_allclose(line.get_ydata(), [0.05, 0.2])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.0, 0.2)
    assert {"a", "dense"} <= {text.get_text() for text in axes.texts}


def test_labels_move_only_as_far_as_they_must():
    np.testing.assert_allclose(figures.apart(np.array([0.1, 0.5]), 0.1), [0.1, 0.5])
    moved = figures.apart(np.array([0.5, 0.5, 0.5]), 0.1)
    np.testing.assert_allclose(moved, [0.4, 0.5, 0.6])
