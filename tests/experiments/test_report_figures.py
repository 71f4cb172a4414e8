"""The figures hold the numbers: their lines, colours and labels, not their pixels."""

import sys
from typing import Any

import matplotlib
import numpy as np
import pytest

from experiments.report import figures, findings, plots, sections, write_report
from experiments.report import results as results_
from jaxprune.lm.report import canvas
from tests.support.synthetic import NAMES, synthetic


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic()


def test_dollars_are_not_read_as_mathematics(tmp_path):
    results = synthetic(seeds=1, criteria=1, allocations=("global",), layers=1)
    for cell in results["seeds"][0]["cells"]:
        cell["criterion"] = r"$\nope{$"
    assert write_report(results, tmp_path)


def test_means_and_bands_are_those_of_the_seeds(results):
    figure = figures.loss(results, allocation="global")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Right after pruning: nats above the dense model",
        "After retraining: nats above the dense control",
    ]
    for axes, stage, run in zip(
        figure.axes, results_.STAGES, ("dense", "control"), strict=True
    ):
        lines = {line.get_label(): line for line in axes.lines}
        for criterion in NAMES[:4]:
            above = np.array(
                [
                    [
                        cell[f"loss_{stage}"] - seed[run]["loss"]
                        for cell in seed["cells"]
                        if (cell["criterion"], cell["allocation"])
                        == (criterion, "global")
                    ]
                    for seed in results["seeds"]
                ]
            )
            x, y = lines[criterion].get_data()
            np.testing.assert_allclose(x, [0, 30, 50, 60, 70, 80, 90, 95])
            np.testing.assert_allclose(y, above.mean(0), atol=1e-12)
            colour = plots.styles([criterion])[criterion].colour
            assert lines[criterion].get_color() == colour
        low, high = axes.get_ylim()
        assert low < -results_.CLOSE
        assert high > above.max()


def test_every_line_is_named_at_its_end_without_overlap(results):
    many = synthetic(criteria=10, allocations=("global",), layers=1)
    for axes in figures.loss(many, allocation="global").axes:
        named = {text.get_text(): text.xyann[1] for text in axes.texts}
        assert set(NAMES) < set(named)
        dense = np.mean([seed["dense"]["loss"] for seed in many["seeds"]])
        assert f"dense  {dense:.3f}" in named
        heights = np.sort(list(named.values()))
        points = axes.get_window_extent().height / axes.figure.dpi * 72
        assert np.diff(heights).min() * points > 12
        assert heights[0] >= 0
        assert heights[-1] <= 1


def test_labels_move_only_as_far_as_they_must():
    np.testing.assert_allclose(plots.apart(np.array([0.1, 0.5]), 0.1), [0.1, 0.5])
    np.testing.assert_allclose(plots.apart(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])
    np.testing.assert_allclose(plots.apart(np.array([0.0, 0.0]), 0.1), [0, 0.1])
    np.testing.assert_allclose(plots.apart(np.array([1.0, 1.0]), 0.1), [0.9, 1])


def test_a_criterion_looks_the_same_in_every_report():
    alone = plots.styles(["preconditioned_magnitude"])["preconditioned_magnitude"]
    assert (
        plots.styles(["mine", "magnitude", "preconditioned_magnitude"])[
            "preconditioned_magnitude"
        ]
        == alone
    )
    assert len({*plots.styles(NAMES).values()}) == len(NAMES)
    assert len({*plots.styles([f"run {i}" for i in range(15)]).values()}) == 15


def test_weights_are_coloured_by_fate_and_marked_with_their_average(results):
    figure = figures.weights(results, ["averaged_weight", "magnitude"])
    sampled = results["seeds"][0]["weights"]
    other = sum(
        a != b for a, b in zip(*(sampled["kept"][n] for n in NAMES[1::-1]), strict=True)
    )
    for axes, criterion in zip(
        figure.axes, ("averaged_weight", "magnitude"), strict=True
    ):
        paths = [line for line in axes.lines if len(line.get_xdata()) == 41]
        assert len(paths) == 24
        for line, values, kept in zip(
            paths, sampled["values"], sampled["kept"][criterion], strict=True
        ):
            np.testing.assert_array_equal(line.get_ydata(), values)
            assert line.get_color() == (canvas.KEPT if kept else canvas.REMOVED)
        marks = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"]
        np.testing.assert_array_equal(marks, sampled["averages"])
        thick = sum(line.get_linewidth() > 1 for line in paths)
        assert thick == (other if criterion == "averaged_weight" else 0)


def test_layers_show_the_scope_in_which_they_differ(results):
    shares, sparsity, allocation = findings.layers(results)
    assert (sparsity, allocation) == (0.6, "global")
    figure = figures.layers(shares, sparsity, allocation)
    (axes,) = figure.axes
    leaf = "blocks/2/mlp/up/kernel"
    expected = np.mean(
        [
            cell["sparsity_by_leaf"][leaf]
            for seed in results["seeds"]
            for cell in seed["cells"]
            if (cell["criterion"], cell["allocation"], cell["sparsity"])
            == ("obd", "global", 0.6)
        ]
    )
    assert shares["obd"][leaf] == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares["obd"])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES[:4])
    row = list(shares["obd"]).index(leaf)
    assert axes.texts[4 * row + 3].get_text() == f"{100 * expected:.0f}"


def test_ten_criteria_and_twelve_sparsities_fit():
    sparsities = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
    results = synthetic(
        seeds=1, criteria=10, sparsities=sparsities, allocations=("global",), layers=1
    )
    for axes in figures.loss(results, allocation="global").axes:
        ticks = axes.get_xticks()
        assert np.diff(ticks).min() > 7
        assert ticks[0] == 0
    assert "97.5\xa0%" in sections.document(results)


@pytest.mark.full
def test_matplotlibs_settings_are_as_before(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(synthetic(seeds=1, criteria=1, layers=1), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules
