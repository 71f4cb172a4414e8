"""Experiments whose report is tables: a page, a CSV, runs side by side."""

import csv
import dataclasses
import json

import pytest

from experiments import compare, recovery, refined_solvers
from experiments.report import tables, write_report
from experiments.report.tables import Report, Table
from tests.support.synthetic import Page

CELLS = [
    {
        **{"seed": seed, "start": start, "loss": loss, "learning_rate": rate},
        **{"dense": 2.0 + seed, "before": 2.5 + seed, "last_loss": 1.0},
        "device": "cpu",
        "after": after + seed,
    }
    for seed in (0, 1)
    for start in recovery.STARTS
    for loss, rate, after in (("text", 1e-3, 2.3), ("text", 3e-3, 2.2))
]
RESULTS = {
    **{"format": 2, "name": "recovery", "device": "1 x <GPU>", "cells": CELLS},
    "config": {"steps": 7, "data": "a & b"},
    "versions": {"jax": "0.12"},
    "command": "python -m experiments.recovery --steps 7",
}


def test_a_page_a_csv_and_the_same_tables_as_text(tmp_path):
    printed = tables.write(RESULTS, tmp_path, recovery.report(RESULTS))
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "report.html"}
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [float(row["after"]) for row in rows] == [cell["after"] for cell in CELLS]
    # Of the two rates the better one, mean and spread of two seeds.
    assert "half of the neurons             3.000 ± 0.707  2.700 ± 0.707 (2)" in printed
    page = Page((tmp_path / "report.html").read_text())
    for text in ("2.700 ± 0.707", "1 x <GPU>", "a & b", RESULTS["command"], "0.12"):
        assert text in page.text, text


def test_rates_are_compared_over_the_seeds_that_all_of_them_have():
    # Of 1e-3 seed 0 alone, which is worse there: the other rate is the best.
    cells = [c for c in CELLS if not (c["learning_rate"] == 1e-3 and c["seed"])]
    (table,) = recovery.report({**RESULTS, "cells": cells}).tables
    assert table.rows[0][2] == "2.700 ± 0.707 (2)"


@pytest.mark.parametrize("name", ["recovery", "trained_mixture", "refined_solvers"])
def test_runs_of_each_experiment_stand_side_by_side(tmp_path, name):
    text = json.dumps({**RESULTS, "name": name})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(text)
    assert len(compare.load([tmp_path / "one", tmp_path / "two"])) == 2


def test_an_unknown_experiment_of_tables_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = json.dumps({**RESULTS, "name": "another"})
        (tmp_path / name / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"runs must be of .* got 'another'"):
        compare.load([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ValueError, match="seeds is missing"):
        write_report(RESULTS, tmp_path)


def test_a_figure_is_on_the_page_and_beside_it(tmp_path):
    from matplotlib.figure import Figure

    drawn = Figure()
    drawn.subplots().plot([1, 2])
    report = Report(
        "lead", {}, [Table(["a"], [["b"]], "of")], ["a"], [{"a": 1}],
        {"loss": tables.Drawing(lambda: drawn, "what it shows")},
    )  # fmt: skip
    tables.write(RESULTS, tmp_path, report)
    assert (tmp_path / "loss.svg").read_bytes().startswith(b"<?xml")
    page = (tmp_path / "report.html").read_text()
    assert "<svg role" in page
    assert "what it shows" in page


def test_runs_stand_one_after_the_other_with_what_differs(tmp_path, capsys):
    other = json.loads(json.dumps(RESULTS))
    other["config"]["steps"] = 9
    other["cells"][1]["after"] = 1.0
    for name, results in (("first", RESULTS), ("second", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    both = [str(tmp_path / "first"), str(tmp_path / "second")]
    compare.main([*both, "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "first: Each at its best learning rate" in output
    assert "second: Each at its best learning rate" in output
    page = Page((tmp_path / "out" / "compare.html").read_text()).text
    assert "steps" in page
    rows = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(CELLS)
    assert rows[1].startswith("first,")


def test_a_table_of_no_cells_is_no_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "cells": []}))
    with pytest.raises(ValueError, match="cells is empty"):
        compare.load([tmp_path, tmp_path / "other"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a black cat sat on the mat, the dog did not. " * 400)
    return path


@pytest.mark.full
def test_recovery_runs_goes_on_and_refuses_another_run(text, tmp_path, monkeypatch):
    config = recovery.Config(
        out=tmp_path / "out", text=text, seeds=(0,), width=16, layers=1, dense_steps=20,
        steps=4, rates=(1e-3,), windows=8,
    )  # fmt: skip
    results = json.loads(recovery.main(config).read_text())
    assert len(results["cells"]) == 2 * len(recovery.STARTS) - 1
    starts = {cell["start"]: cell for cell in results["cells"]}
    assert starts["dense"]["before"] == starts["dense"]["dense"]
    assert starts["pruned"]["before"] > starts["dense"]["dense"]
    lost = next((tmp_path / "out" / "cells").glob("pruned-teacher-*"))
    lost.unlink()
    again = json.loads(recovery.main(config).read_text())
    assert again["cells"] == results["cells"]
    monkeypatch.setattr(recovery, "_run", None)
    # Nothing is done: what made the cells is what made them before.
    path = recovery.main(config)
    assert json.loads(path.read_text()) == again
    assert path.with_name("report.html").exists()
    with pytest.raises(ValueError, match="width"):
        recovery.main(dataclasses.replace(config, width=32))


@pytest.mark.full
def test_refined_solvers_runs_and_a_finished_run_does_nothing(tmp_path, monkeypatch):
    config = refined_solvers.Config(
        out=tmp_path / "out", draws=(0,), methods=("sparsegpt",), sequences=32,
        calibrations=("both",), passes=(0, 1), corrections=(0.5,), steps=6,
        eval_tokens=256,
    )  # fmt: skip
    results = json.loads(refined_solvers.main(config).read_text())
    assert [cell["passes"] for cell in results["cells"]] == [0, 1]
    assert [cell["correction"] for cell in results["cells"]] == [0.5, 0.5]
    assert all(
        cell["loss"] > results["dense"]["0"]["loss"] for cell in results["cells"]
    )
    monkeypatch.setattr(refined_solvers.Run, "done", None)
    again = json.loads(refined_solvers.main(config).read_text())
    assert again["cells"] == results["cells"]


def test_too_few_sequences_for_a_refinement_are_refused_first(tmp_path):
    config = refined_solvers.Config(out=tmp_path / "out", sequences=16)
    with pytest.raises(ValueError, match=r"sequences must be >= 32 .*, got 16"):
        refined_solvers.main(config)
    assert not config.out.exists()
