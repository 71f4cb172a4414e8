"""The report says what results.json says, on one page that needs nothing else."""

import copy
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.report import figures, provenance, sections, write_report
from experiments.report import results as results_
from jaxprune.lm.report import canvas
from tests.support.synthetic import Page, synthetic


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic()


@pytest.fixture(scope="module")
def written(
    results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    return {path.name: path for path in write_report(results, folder)}


@pytest.mark.full
def test_every_file_is_written_and_nothing_else(written):
    folder = written["report.html"].parent
    names = {"results.csv", "report.html"}
    figures_ = "loss_global loss_layer weights layers training life_cycle"
    for figure in figures_.split():
        names |= {f"{figure}.png", f"{figure}.svg"}
    assert set(written) == names == {path.name for path in folder.iterdir()}
    for path in written.values():
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
        if path.suffix == ".svg":
            assert "<svg" in path.read_text(encoding="utf-8")


def test_the_csv_has_one_row_for_each_cell_of_each_seed(results, written):
    with written["results.csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == results_.COLUMNS
    assert len(rows) == sum(len(seed["cells"]) for seed in results["seeds"])
    seed, cell = results["seeds"][1], results["seeds"][1]["cells"][5]
    (row,) = (
        row
        for row in rows
        if row["seed"] == "1"
        and (row["criterion"], row["allocation"])
        == (cell["criterion"], cell["allocation"])
        and float(row["sparsity"]) == cell["sparsity"]
    )
    assert float(row["loss_pruned"]) == cell["loss_pruned"]
    assert float(row["loss_retrained"]) == cell["loss_retrained"]
    assert float(row["dense_loss"]) == seed["dense"]["loss"]
    assert float(row["control_loss"]) == seed["control"]["loss"]
    assert (row["dense_steps"], row["control_steps"]) == ("2000", "2500")


def test_the_page_loads_nothing_and_closes_what_it_opens(written):
    text = written["report.html"].read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.open
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    for tag, attributes in parsed.tags:
        assert tag not in {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "image",
        }
        for name in ("src", "href", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


def test_ids_are_unique_and_every_reference_is_answered(written):
    text = written["report.html"].read_text(encoding="utf-8")
    ids = [tag[1]["id"] for tag in Page(text).tags if "id" in tag[1]]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_the_page_follows_dark_and_light(written):
    text = written["report.html"].read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert "prefers-color-scheme:dark" in text
    for light, dark in canvas.DARK.items():
        assert f"--{light[1:]}:{light};" in text
        assert f"--{light[1:]}:{dark};" in text
        assert light not in body


def test_all_text_is_escaped():
    hostile = "<script>alert(1)</script>&\"'"
    results = synthetic(seeds=1, criteria=1, allocations=("global",), layers=1)
    results |= {"name": hostile, "device": hostile, "command": hostile}
    results["config"] = {hostile: hostile}
    results["versions"] = {hostile: hostile}
    results["phases"][0]["name"] = hostile
    (seed,) = results["seeds"]
    seed["samples"] = [{"label": hostile, "text": hostile}]
    for cell in seed["cells"]:
        cell["criterion"] = hostile
        cell["sparsity_by_leaf"] = {hostile: cell["sparsity"]}
    seed["weights"]["kept"] = {hostile: seed["weights"]["kept"]["magnitude"]}
    text = sections.document(results)
    parsed = Page(text)
    assert not parsed.open
    assert not any(tag == "script" for tag, _ in parsed.tags)
    assert parsed.text.count(hostile) > 10


def test_names_of_files_cannot_leave_the_folder(tmp_path):
    results = synthetic(seeds=1, criteria=1, allocations=("../up",), layers=1)
    with pytest.raises(ValueError, match=r"allocation.*'\.\./up'"):
        write_report(results, tmp_path / "in")
    assert not list(tmp_path.iterdir())


def test_the_best_of_each_column_is_marked(results):
    text = sections.document(results)
    marks = [tag for tag in Page(text).tags if tag == ("td", {"class": "best"})]
    curves = results_.curves(results, "pruned", "global")
    lowest = min(curves, key=lambda curve: curve.losses[:, 3].mean())
    mean = f"{lowest.losses[:, 3].mean():.3f}"
    assert re.search(rf'<td class="best">{mean} ± [\d.]+<small>', text)
    assert len(marks) >= 4 * 7  # both allocations and stages, every sparsity but 0


def test_columns_that_were_not_measured_are_left_out():
    results = synthetic(criteria=1, allocations=("global",), layers=1)
    results |= {"costs": None}  # the life cycle tells of CO₂ too
    text = Page(sections.document(results)).text
    assert "peak memory" in text
    assert "CO₂" not in text
    counted = copy.deepcopy(results)
    for phase in counted["phases"]:
        phase |= {"energy_kwh": 0.001, "co2_kg": 0.0005, "peak_memory_bytes": None}
    text = Page(sections.document(counted)).text
    assert "CO₂" in text
    assert "9 Wh" in text  # 3 phases of 3 seeds, 1 Wh each
    assert "peak memory" not in text


def test_the_command_is_the_recorded_one_or_made_from_the_configuration(results):
    assert provenance.command(results) == (
        "python -m experiments.scaled_down_llm --preset cpu --seeds 0 1 2 --sparsities "
        "0.0 0.3 0.5 0.6 0.7 0.8 0.9 0.95 --learning-rate 0.001 --no-smoke"
    )
    nested = results | {"config": {"a": {"b_c": True}, "out": "my runs"}}
    assert provenance.command(nested).endswith("--a.b-c --out 'my runs'")
    recorded = "python -m experiments.scaled_down_llm --smoke"
    assert provenance.command(results | {"command": recorded}) == recorded
    small = synthetic(seeds=1, criteria=1, allocations=("global",), layers=1)
    assert recorded in Page(sections.document(small | {"command": recorded})).text


@pytest.fixture
def page_alone(monkeypatch):
    """The figures are drawn for the page, and not once more as files."""
    monkeypatch.setattr(sections, "drawings", lambda results: {})


@pytest.mark.usefixtures("page_alone")
@pytest.mark.parametrize("seeds", [1, 2])
def test_without_retraining_the_report_is_about_pruning(tmp_path, seeds):
    results = synthetic(seeds=seeds, criteria=2, retrained=False, layers=1)
    write_report(results, tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "After retraining" not in text
    assert "Right after pruning" in text
    spread = re.search(r"\d\.\d{3} ± \d\.\d{3}", text)
    assert bool(spread) == (seeds > 1)
    assert len(figures.loss(results, allocation="layer").axes) == 1


def test_optional_parts_may_be_absent(tmp_path):
    results = synthetic(seeds=1, criteria=1, allocations=("layer",), layers=1)
    for seed in results["seeds"]:
        seed |= {"samples": [], "weights": None, "curve": []}
        for cell in seed["cells"]:
            del cell["sparsity_by_leaf"]
    results |= {"phases": [], "costs": None}
    del results["finished"]
    names = {path.name for path in write_report(results, tmp_path)}
    assert names == {"results.csv", "loss_layer.png", "loss_layer.svg", "report.html"}
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Text sampled" not in text
    assert "Bytes, FLOPs" not in text


@pytest.mark.usefixtures("page_alone")
def test_answers_that_are_right_are_counted_where_they_were_measured(tmp_path):
    results = synthetic(seeds=2, criteria=2, allocations=("global",), layers=1)
    for seed in results["seeds"]:
        seed["dense"] |= {"accuracy": 0.75, "by_question": {"what is it ?": 0.5}}
        for cell in seed["cells"]:
            cell["accuracy_pruned"] = 0.75 * (1 - cell["sparsity"])
            cell["by_question_pruned"] = {"what is it ?": 0.25}
    results["text_only"] = {"accuracy": 0.125}
    write_report(results, tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Questions answered right" in text
    assert "Percent right of each question" in text
    assert "without the picture: 12.5" in text
    header = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert header[-4:] == [
        *("accuracy_pruned", "accuracy_retrained"),
        *("dense_accuracy", "control_accuracy"),
    ]


@pytest.mark.full
def test_the_same_results_give_the_same_bytes(tmp_path):
    results = synthetic(seeds=1, criteria=2, allocations=("global",), layers=1)
    first = [path.read_bytes() for path in write_report(results, tmp_path / "a")]
    again = [path.read_bytes() for path in write_report(results, tmp_path / "b")]
    assert first == again


def test_the_report_imports_matplotlib_only_when_it_writes():
    code = "import sys, experiments.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [*sys.modules]:
        drawing = name.startswith(("experiments.report.", "jaxprune.lm.report."))
        if drawing and name != "experiments.report.results":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxprune.lm.report.canvas", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[experiments\]'"):
        write_report(synthetic(seeds=1, criteria=1, layers=1), tmp_path)
