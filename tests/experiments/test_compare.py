"""compare puts runs side by side, says what differed, and refuses what does not fit."""

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import compare
from experiments.report import figures
from tests.support.synthetic import Page, synthetic


def put(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    first = synthetic(seeds=2, criteria=2, allocations=("global",), layers=1)
    second = copy.deepcopy(first)
    second["config"]["learning_rate"] = 3e-4
    second["config"]["nested"] = {"decay": 0.1}
    second["device"] = "1 x <GPU>"
    for seed in second["seeds"]:
        for cell in seed["cells"]:
            cell["loss_pruned"] += 0.1
    return [put(tmp_path / "first", first), put(tmp_path / "second", second)]


def test_the_command_prints_a_table_and_writes_both_files(pair, tmp_path, capsys):
    compare.main([*map(str, pair), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    runs = compare.load(pair)
    cells = [
        (cell["loss_pruned"] - seed["dense"]["loss"])
        for seed in runs["first"]["seeds"]
        for cell in seed["cells"]
        if (cell["criterion"], cell["sparsity"]) == ("magnitude", 0.6)
    ]
    spread = np.std(cells, ddof=1)
    line = (
        rf"magnitude +global +60\s% +\+{np.mean(cells):.3f} ± {spread:.3f} "
        rf"+\+{np.mean(cells) + 0.1:.3f} ± {spread:.3f}"
    )
    assert re.search(line, printed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.csv",
        "compare.html",
    }
    with (tmp_path / "out" / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 8
    assert {row["run"] for row in rows} == {"first", "second"}


def test_the_page_is_self_contained_and_escaped(pair, tmp_path):
    compare.compare(compare.load(pair), tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.open
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "1 x <GPU>" in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 2  # pruned and retrained


def test_only_what_differs_is_listed(pair):
    assert compare.differences(compare.load(pair)) == [
        ["learning_rate", "0.001", "0.0003"],
        ["nested.decay", "-", "0.1"],
        ["device", "2 x CPU (x86_64)", "1 x <GPU>"],
    ]


def test_equal_runs_are_said_to_be_equal(pair, tmp_path):
    run = compare.load(pair)["first"]
    printed = compare.compare({"a": run, "b": run}, tmp_path / "out")
    assert "What differs" not in printed
    text = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "Configuration, versions and device are the same." in text


def test_a_panel_for_each_criterion_has_a_line_for_each_run(pair):
    runs = compare.load(pair)
    figure = figures.runs(runs, stage="pruned", allocation="global")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "magnitude",
        "averaged_weight",
    ]
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_allclose(lines["second"] - lines["first"], 0.1, atol=1e-12)
        assert {text.get_text() for text in axes.texts} == {"first", "second"}


def test_what_one_run_lacks_is_a_dash(pair):
    runs = compare.load(pair)
    for seed in runs["second"]["seeds"]:
        seed["control"] = None
        seed["cells"] = seed["cells"][:1]
        for cell in seed["cells"]:
            cell["loss_retrained"] = None
    rows = compare.losses(runs, "retrained")
    assert {row[4] for row in rows} == {"-"}
    assert {len(row) for row in rows} == {5}
    assert compare.summary(runs)[2][2] == "-"
    assert figures.runs(runs, stage="retrained", allocation="global").axes


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path, pair):
    run = compare.load(pair)["first"]
    paths = [put(tmp_path / which / "run", run) for which in "ab"]
    assert list(compare.load(paths)) == ["a/run", "b/run"]
    other = paths[0] / "older.json"
    other.write_text((paths[0] / "results.json").read_text())
    assert list(compare.load([paths[0], other])) == [".", "older.json"]


def test_foreign_files_are_refused(tmp_path, pair, capsys):
    first, _ = pair
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        compare.load([first])
    with pytest.raises(ValueError, match=r"given once, got '.*first/results\.json'"):
        compare.load([first, first / "results.json"])
    with pytest.raises(ValueError, match=r"absent.*does not exist"):
        compare.load([first, tmp_path / "absent"])
    foreign = put(tmp_path / "foreign", {"anything": 1})
    with pytest.raises(ValueError, match=r"foreign.* of format 2, got format None"):
        compare.load([first, foreign])
    other = compare.load(pair)["second"] | {"name": "phi3"}
    put(tmp_path / "other", other)
    with pytest.raises(ValueError, match=r"one experiment, got 'scaled_down_llm' in"):
        compare.load([first, tmp_path / "other"])
    with pytest.raises(SystemExit, match=r"compare: .*two runs"):
        compare.main([str(first), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
