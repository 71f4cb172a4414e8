"""The report says what results.json says, on one page that needs nothing else."""

import copy
import csv
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from jaxprune.report import canvas, figures, findings, page, sections, write_report
from jaxprune.report import results as results_

NAMES = (
    "magnitude",
    "averaged_weight",
    "averaged_magnitude",
    "obd",
    "trajectory",
    "taylor",
    "random",
    "threshold_average",
    "threshold_weight",
    "wanda",
)
BEST_FIRST = (
    "trajectory",
    "obd",
    "averaged_magnitude",
    "taylor",
    "averaged_weight",
    "threshold_average",
    "magnitude",
    "threshold_weight",
    "wanda",
    "random",
)


def synthetic(
    *,
    seeds: int = 3,
    criteria: int = 4,
    sparsities: tuple[float, ...] = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    scopes: tuple[str, ...] = ("global", "layer"),
    retrained: bool = True,
    layers: int = 4,
) -> dict[str, Any]:
    """Results in the shape of a real run: flat, then rising steeply; made up."""
    draw = np.random.default_rng(0)
    leaves = {"token_embedding/embedding": (65, 128)}
    for block in range(layers):
        for name, shape in (
            ("attention/qkv", (128, 384)),
            ("attention/out", (128, 128)),
            ("mlp/up", (128, 512)),
            ("mlp/down", (512, 128)),
        ):
            leaves[f"blocks/{block}/{name}/kernel"] = shape
    prunable = [name for name in leaves if name.startswith("blocks")]
    depth = np.linspace(-0.5, 0.5, len(prunable))

    def cell(criterion: str, scope: str, sparsity: float, dense: float) -> dict:
        rank = BEST_FIRST.index(criterion)
        rise = (0.03 + 0.016 * rank) * (sparsity / (1 - sparsity)) ** 1.6 * 0.45
        rise *= 1 + 0.12 * draw.standard_normal() + 0.2 * (scope == "layer")
        rise = 2.5 * math.tanh(rise / 2.5)
        held = rise**1.3 * 0.1 + 0.002 * draw.standard_normal() - 0.002
        tilt = 0.2 * sparsity * (1 - sparsity) * (scope == "global") * (1 + rank / 3)
        return {
            "criterion": criterion,
            "scope": scope,
            "sparsity": sparsity,
            "achieved": sparsity,
            "loss_pruned": dense + rise,
            "loss_retrained": dense - 0.042 + held if retrained else None,
            "sparsity_by_leaf": {
                name: float(np.clip(sparsity + tilt * at, 0, 1))
                for name, at in zip(prunable, draw.permutation(depth), strict=True)
            },
        }

    def weights(chosen: tuple[str, ...]) -> dict[str, Any]:
        steps = list(range(0, 2001, 50))
        walk = 0.004 * draw.standard_normal((24, len(steps))).cumsum(1)
        drift = 0.06 * draw.standard_normal((24, 1)) * np.linspace(0, 1, len(steps))
        values = 0.02 * draw.standard_normal((24, 1)) + walk + drift
        shares = np.sqrt(np.arange(1, len(steps) + 1))
        averages = values @ shares / shares.sum()
        limits = {"magnitude": np.abs(values[:, -1]), "averaged_weight": abs(averages)}
        other = np.abs(averages) + 0.02 * draw.random(24)
        ranks = {name: limits.get(name, other) for name in chosen}
        return {
            "steps": steps,
            "names": [f"blocks/0/mlp/up/kernel[3, {index}]" for index in range(24)],
            "values": values.tolist(),
            "averages": averages.tolist(),
            "kept": {n: (r > np.quantile(r, 0.6)).tolist() for n, r in ranks.items()},
            "sparsity": 0.6,
        }

    def run(seed: int) -> dict[str, Any]:
        dense = 1.908 + 0.008 * float(draw.standard_normal())
        noisy = [
            {
                "step": step,
                "loss": dense
                - 0.1
                + 2.3 * math.exp(-step / 300)
                + 0.05 * draw.random(),
                "validation_loss": dense + 2.3 * math.exp(-step / 300)
                if step % 200 == 0
                else None,
            }
            for step in range(0, 2001, 20)
        ]
        text = "\nKING:\nWhat <b>say'st</b> thou & thine?\n\nDUKE:\nMy lord, no more."
        return {
            "seed": seed,
            "dense": {"steps": 2000, "loss": dense},
            "control": {"steps": 2500, "loss": dense - 0.042} if retrained else None,
            "curve": noisy,
            "cells": [
                cell(criterion, scope, sparsity, dense)
                for criterion in NAMES[:criteria]
                for scope in scopes
                for sparsity in sparsities
            ],
            "samples": [
                {"label": label, "text": text * 4}
                for label in ("dense", "trajectory 60 %", "trajectory 60 %, retrained")
            ],
            "weights": weights(NAMES[:criteria]),
        }

    return {
        "format": 1,
        "name": "scaled_down_llm",
        "config": {
            "preset": "cpu",
            "text": None,
            "seeds": list(range(seeds)),
            "sparsities": list(sparsities),
            "learning_rate": 1e-3,
            "smoke": False,
        },
        "versions": {"python": "3.13.1", "jax": "0.12.0", "optax": "0.2.6"},
        "device": "2 x CPU (x86_64)",
        "finished": "2026-11-24T16:20:00+00:00",
        "model": {
            "parameters": 816_512,
            "prunable": 786_432,
            "leaves": {
                name: {
                    "shape": list(shape),
                    "size": math.prod(shape),
                    "prunable": name in prunable,
                }
                for name, shape in leaves.items()
            },
        },
        "seeds": [run(seed) for seed in range(seeds)],
        "phases": [
            {
                "name": name,
                "seed": seed,
                "seconds": seconds + seed,
                "tokens_per_second": rate,
                "peak_memory_bytes": 412_000_000 + 1000 * seed,
                "energy_kwh": None,
                "co2_kg": None,
            }
            for seed in range(seeds)
            for name, seconds, rate in (
                ("train", 61.2, 25_100.0),
                ("prune and measure", 12.7, None),
                ("retrain", 180.4, 24_800.0),
            )
        ],
        "costs": [
            {
                "sparsity": sparsity,
                "bytes_dense": 3_266_048,
                "bytes_packed": int(3_266_048 * (1 - sparsity)) + 98_304,
                "flops_dense": 1_630_000,
                "flops_kept": int(1_630_000 * (1 - sparsity)) + 60_000,
            }
            for sparsity in sparsities
        ],
    }


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, all text, and what was left open."""

    VOID = frozenset(("meta", "br", "path", "use", "rect", "line", "link", "img"))

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic()


@pytest.fixture(scope="module")
def written(
    results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    return {path.name: path for path in write_report(results, folder)}


def test_every_file_is_written_and_nothing_else(written):
    folder = written["report.html"].parent
    names = {"results.csv", "report.html"}
    for figure in ("loss_global", "loss_layer", "weights", "layers", "training"):
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
        and (row["criterion"], row["scope"]) == (cell["criterion"], cell["scope"])
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
    results = synthetic(seeds=1, criteria=1, scopes=("global",), layers=1)
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
    results = synthetic(seeds=1, criteria=1, scopes=("../up",), layers=1)
    with pytest.raises(ValueError, match=r"scope.*'\.\./up'"):
        write_report(results, tmp_path / "in")
    assert not list(tmp_path.iterdir())


def test_dollars_are_not_read_as_mathematics(tmp_path):
    results = synthetic(seeds=1, criteria=1, scopes=("global",), layers=1)
    for cell in results["seeds"][0]["cells"]:
        cell["criterion"] = r"$\nope{$"
    assert write_report(results, tmp_path)


def test_means_and_bands_are_those_of_the_seeds(results):
    figure = figures.loss(results, scope="global")
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
                        if (cell["criterion"], cell["scope"]) == (criterion, "global")
                    ]
                    for seed in results["seeds"]
                ]
            )
            x, y = lines[criterion].get_data()
            np.testing.assert_allclose(x, [0, 30, 50, 60, 70, 80, 90, 95])
            np.testing.assert_allclose(y, above.mean(0), atol=1e-12)
            colour = canvas.styles([criterion])[criterion].colour
            assert lines[criterion].get_color() == colour
        low, high = axes.get_ylim()
        assert low < -results_.CLOSE
        assert high > above.max()


def test_every_line_is_named_at_its_end_without_overlap(results):
    many = synthetic(criteria=10, scopes=("global",), layers=1)
    for axes in figures.loss(many, scope="global").axes:
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
    np.testing.assert_allclose(canvas.apart(np.array([0.1, 0.5]), 0.1), [0.1, 0.5])
    np.testing.assert_allclose(canvas.apart(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])
    np.testing.assert_allclose(canvas.apart(np.array([0.0, 0.0]), 0.1), [0, 0.1])
    np.testing.assert_allclose(canvas.apart(np.array([1.0, 1.0]), 0.1), [0.9, 1])


def test_a_criterion_looks_the_same_in_every_report():
    alone = canvas.styles(["trajectory"])["trajectory"]
    assert canvas.styles(["mine", "magnitude", "trajectory"])["trajectory"] == alone
    assert len({*canvas.styles(NAMES).values()}) == len(NAMES)
    assert len({*canvas.styles([f"run {i}" for i in range(15)]).values()}) == 15


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
    shares, sparsity, scope = findings.layers(results)
    assert (sparsity, scope) == (0.6, "global")
    figure = figures.layers(shares, sparsity, scope)
    (axes,) = figure.axes
    leaf = "blocks/2/mlp/up/kernel"
    expected = np.mean(
        [
            cell["sparsity_by_leaf"][leaf]
            for seed in results["seeds"]
            for cell in seed["cells"]
            if (cell["criterion"], cell["scope"], cell["sparsity"])
            == ("obd", "global", 0.6)
        ]
    )
    assert shares["obd"][leaf] == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(shares["obd"])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES[:4])
    row = list(shares["obd"]).index(leaf)
    assert axes.texts[4 * row + 3].get_text() == f"{100 * expected:.0f}"


def exact(above: dict[float, list[float]], *, seeds: int = 2) -> dict[str, Any]:
    """Results whose retrained losses lie exactly so far above the control."""
    results = synthetic(
        seeds=seeds, criteria=1, scopes=("global",), sparsities=tuple(above), layers=1
    )
    for index, seed in enumerate(results["seeds"]):
        seed["dense"]["loss"], seed["control"]["loss"] = 2.0, 1.5
        for cell in seed["cells"]:
            cell["loss_pruned"] = 3.0
            cell["loss_retrained"] = 1.5 + above[cell["sparsity"]][index]
    return results


def test_the_headline_is_computed_from_the_numbers():
    results = exact({0.0: [0, 0], 0.5: [0.01, 0.018], 0.7: [0.1, 0.1], 0.8: [0, 0]})
    first, second, third = findings.headline(results)
    assert first == (
        "Retrained for 500 steps with the mask held, magnitude stays within 0.015 nats "
        "of the dense model given the same steps up to 50\xa0% sparsity (mean of 2 "
        "seeds)."
    )
    assert second == (
        "Right after pruning, no criterion stays within 0.015 nats of the dense model "
        "(mean of 2 seeds)."
    )
    assert third.startswith("Pruning never lowered the loss: the lowest of 3 is")


def test_a_gain_within_the_spread_of_the_seeds_is_called_so():
    noisy = exact({0.3: [-0.01, 0.008], 0.5: [0.1, 0.1]})
    assert (
        "1 of 2 seeds, no more than the spread of the seeds"
        in findings.headline(noisy)[-1]
    )
    clear = exact({0.3: [-0.01, -0.011], 0.5: [0.1, 0.1]})
    assert "under it for 2 of 2 seeds; a lowest" in findings.headline(clear)[-1]
    single = exact({0.3: [-0.01]}, seeds=1)
    assert "1 of 1 seeds, with one seed and no spread" in findings.headline(single)[-1]
    only = exact({0.0: [0.0]}, seeds=1)
    assert findings.headline(only)[-1] == "Nothing but the dense model was retrained."


def test_reach_stops_at_the_first_sparsity_over_the_limit():
    (curve,) = results_.curves(
        exact({0.0: [0, 0], 0.5: [0.01, 0.018], 0.7: [0.1, 0.1], 0.8: [0, 0]}),
        "retrained",
    )
    assert curve.reach(0.015) == 0.5
    assert curve.reach(0.015, worst=True) == 0.0
    assert curve.reach(0.01, relative=True) == 0.5  # 0.014 of 1.5 nats
    assert curve.reach(0.0125, relative=True, worst=True) == 0.5
    assert curve.reach(-1) is None


def test_the_best_of_each_column_is_marked(results):
    body = Page(sections.document(results))
    marks = [tag for tag in body.tags if tag == ("td", {"class": "best"})]
    curves = results_.curves(results, "pruned", "global")
    lowest = min(curves, key=lambda curve: curve.losses[:, 3].mean())
    mean = f"{lowest.losses[:, 3].mean():.3f}"
    assert re.search(
        rf'<td class="best">{mean} ± [\d.]+<small>', sections.document(results)
    )
    assert len(marks) >= 4 * 7  # both scopes and stages, every sparsity but 0


def test_columns_that_were_not_measured_are_left_out(results):
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
    assert sections.command(results) == (
        "python -m experiments.scaled_down_llm --preset cpu --seeds 0 1 2 --sparsities "
        "0.0 0.3 0.5 0.6 0.7 0.8 0.9 0.95 --learning-rate 0.001 --no-smoke"
    )
    nested = results | {"config": {"a": {"b_c": True}, "out": "my runs"}}
    assert sections.command(nested).endswith("--a.b-c --out 'my runs'")
    recorded = "python -m experiments.scaled_down_llm --smoke"
    assert sections.command(results | {"command": recorded}) == recorded
    assert recorded in Page(sections.document(results | {"command": recorded})).text


@pytest.mark.parametrize("seeds", [1, 2])
def test_without_retraining_the_report_is_about_pruning(tmp_path, seeds):
    results = synthetic(seeds=seeds, criteria=2, retrained=False, layers=1)
    write_report(results, tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "After retraining" not in text
    assert "Right after pruning" in text
    assert ("±" in re.sub("±0.015", "", text.split("Text sampled")[0])) == (
        seeds > 1
    ) or "mean ± spread" in text
    assert len(figures.loss(results, scope="layer").axes) == 1


def test_optional_parts_may_be_absent(tmp_path):
    results = synthetic(seeds=1, criteria=1, scopes=("layer",), layers=1)
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


def test_a_cell_that_one_seed_lacks_leaves_the_mean_of_the_others():
    results = synthetic(seeds=2, criteria=2, scopes=("global",), layers=1)
    gone = results["seeds"][0]["cells"].pop(3)
    curve = results_.curves(results, "pruned")[0]
    cell = results["seeds"][1]["cells"][3]
    assert gone["sparsity"] == cell["sparsity"] == curve.sparsities[3]
    above = cell["loss_pruned"] - results["seeds"][1]["dense"]["loss"]
    assert float(curve.above.mean(0)[3]) == pytest.approx(above)
    assert sections.document(results)


def test_ten_criteria_and_twelve_sparsities_fit():
    sparsities = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
    results = synthetic(
        seeds=1, criteria=10, sparsities=sparsities, scopes=("global",), layers=1
    )
    for axes in figures.loss(results, scope="global").axes:
        ticks = axes.get_xticks()
        assert np.diff(ticks).min() > 7
        assert ticks[0] == 0
    assert "97.5\xa0%" in sections.document(results)


def _without(path: str, results: dict[str, Any]) -> dict[str, Any]:
    *folders, last = re.findall(r"\w+", path)
    at: Any = results
    for name in folders:
        at = at[int(name) if name.isdigit() else name]
    del at[last]
    return results


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "device",
        "model.prunable",
        "seeds[1].dense.loss",
        "seeds[0].cells[2].loss_pruned",
        "seeds[0].weights.averages",
        "costs[0].bytes_packed",
    ],
)
def test_what_is_missing_is_named(tmp_path, path):
    results = _without(path, synthetic(seeds=2, criteria=1, layers=1))
    with pytest.raises(ValueError, match=rf"{re.escape(path)} is missing"):
        write_report(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _spoil(change: str, results: dict[str, Any]) -> Any:
    first, second = results["seeds"]
    cell = first["cells"][1]
    match change:
        case "nan":
            cell["loss_retrained"] = math.nan
        case "infinite":
            second["dense"]["loss"] = math.inf
        case "no cells":
            second["cells"] = []
        case "no seeds":
            results["seeds"] = []
        case "text":
            cell["loss_pruned"] = "1.9"
        case "boolean":
            first["dense"]["steps"] = True
        case "not a list":
            first["cells"] = "cells"
        case "not an object":
            results["model"] = 3
        case "range":
            cell["sparsity"] = 1.0
        case "double cell":
            first["cells"].append(dict(cell))
        case "double seed":
            second["seed"] = first["seed"]
        case "no control":
            second["control"] = None
        case "short":
            first["weights"]["kept"]["magnitude"].pop()
        case "short row":
            first["weights"]["values"][0].pop()
        case "format":
            results["format"] = 2
        case "no format":
            del results["format"]
        case "list":
            return [results]
    return results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"seeds\[0\]\.cells\[1\]\.loss_retrained must be finite, got nan"),
        ("infinite", r"seeds\[1\]\.dense\.loss must be finite, got inf"),
        ("no cells", r"seeds\[1\]\.cells is empty"),
        ("no seeds", r"seeds is empty"),
        ("text", r"loss_pruned must be a number, got '1\.9'"),
        ("boolean", r"seeds\[0\]\.dense\.steps must be an integer, got True"),
        ("not a list", r"seeds\[0\]\.cells must be a list, got 'cells'"),
        ("not an object", r"model must be an object, got 3"),
        ("range", r"cells\[1\]\.sparsity must be in \[0, 1\), got 1\.0"),
        ("double cell", r"cells\[\d+\] repeats \('magnitude', 'global', 0\.3\)"),
        ("double seed", r"seeds\[1\]\.seed is 0 twice"),
        ("no control", r"seeds\[1\]\.control is missing though cells were retrained"),
        ("short", r"weights\.kept\.magnitude must have 24 entries, got 23"),
        ("short row", r"weights\.values must have one value a step, 41"),
        ("format", r"of format 1, got format 2"),
        ("no format", r"of format 1, got format None"),
        ("list", r"of format 1, got list None"),
    ],
)
def test_bad_results_are_refused_by_name(tmp_path, change, message):
    results = _spoil(change, synthetic(seeds=2, criteria=1, layers=1))
    with pytest.raises(ValueError, match=message):
        write_report(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_faults_are_one_error_that_counts_them():
    results = synthetic(seeds=2, criteria=2, layers=1)
    for seed in results["seeds"]:
        for cell in seed["cells"]:
            cell["loss_pruned"] = None
    with pytest.raises(ValueError, match=r"loss_pruned is missing; and 56 more; run"):
        results_.check(results)


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    replace = page.os.replace

    def full(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        if target.name == "a.txt":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        page.write_files({"b.txt": b"b", "a.txt": b"new"}, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.txt": "old",
        "b.txt": "b",
    }


def test_a_folder_that_is_a_file_is_an_error(tmp_path, results):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        page.write_files({"a.txt": b""}, tmp_path / "file")


def test_the_same_results_give_the_same_bytes(tmp_path):
    results = synthetic(seeds=1, criteria=2, scopes=("global",), layers=1)
    first = [path.read_bytes() for path in write_report(results, tmp_path / "a")]
    again = [path.read_bytes() for path in write_report(results, tmp_path / "b")]
    assert first == again


def test_matplotlibs_settings_are_as_before(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(synthetic(seeds=1, criteria=1, layers=1), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules


def test_the_report_imports_matplotlib_only_when_it_writes():
    code = "import sys, jaxprune.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxprune.report.")]:
        if name != "jaxprune.report.results":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxprune.report.canvas")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxprune\[experiments\]'"):
        write_report(synthetic(seeds=1, criteria=1, layers=1), tmp_path)


def test_read_takes_a_file_or_its_folder(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert results_.read(tmp_path) == results_.read(tmp_path / "results.json")
    assert results_.read(tmp_path) == results
    with pytest.raises(ValueError, match=r"none.* does not exist"):
        results_.read(tmp_path / "none")
    (tmp_path / "torn.json").write_text('{"format": 1, ')
    with pytest.raises(ValueError, match=r"torn\.json' is not JSON"):
        results_.read(tmp_path / "torn.json")
