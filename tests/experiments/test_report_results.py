"""Results are refused when anything is wrong, and read for what they say."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from experiments.datasets import Corpus
from experiments.report import findings, sections, write_report
from experiments.report import results as results_
from tests.support.synthetic import synthetic


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic()


def exact(above: dict[float, list[float]], *, seeds: int = 2) -> dict[str, Any]:
    """Results whose retrained losses lie exactly so far above the control."""
    results = synthetic(
        seeds=seeds,
        criteria=1,
        allocations=("global",),
        sparsities=tuple(above),
        layers=1,
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
    assert findings.headline(single)[-1].startswith("Whether pruning lowered a loss")
    assert not any("lowest" in sentence for sentence in findings.headline(single))
    only = exact({0.0: [0.0]}, seeds=1)
    assert findings.headline(only)[-1] == "Nothing but the dense model was retrained."


@pytest.mark.parametrize(
    ("guessed", "smoke", "said"),
    [
        (2.5, False, "Not trained: after {} steps the dense loss is 2.00 nats, and"),
        (2.7, False, ""),  # 2.0 is less than three quarters of it
        (None, False, ""),
        (None, True, "Not trained: a smoke run of {} steps; the numbers show that"),
    ],
)
def test_of_a_model_that_is_not_trained_nothing_is_claimed(guessed, smoke, said):
    results = exact({0.0: [0, 0], 0.5: [-0.1, -0.1]})
    results["model"]["nats_by_frequency"] = guessed
    results["config"]["smoke"] = smoke
    steps = results["seeds"][0]["dense"]["steps"]
    page = sections.document(results)
    assert f"<dt>steps of training</dt><dd>{steps:,}</dd>" in page
    if not said:
        assert findings.untrained(results) == ""
        assert len(findings.headline(results)) == 3
        assert '<p class="banner">' not in page
        return
    (sentence,) = findings.headline(results)
    assert sentence.startswith(said.format(steps))
    assert sentence.endswith("and nothing about pruning.")
    assert '<p class="banner">not trained</p>' in page


def test_guessing_by_frequency_has_the_entropy_of_the_characters():
    corpus = Corpus.of("a", "abcd", "aabb")
    assert corpus.nats_by_frequency == pytest.approx(np.log(2))


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


def test_a_cell_that_one_seed_lacks_leaves_the_mean_of_the_others():
    results = synthetic(seeds=2, criteria=2, allocations=("global",), layers=1)
    gone = results["seeds"][0]["cells"].pop(3)
    curve = results_.curves(results, "pruned")[0]
    cell = results["seeds"][1]["cells"][3]
    assert gone["sparsity"] == cell["sparsity"] == curve.sparsities[3]
    above = cell["loss_pruned"] - results["seeds"][1]["dense"]["loss"]
    assert float(curve.above.mean(0)[3]) == pytest.approx(above)
    assert sections.document(results)


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
            results["format"] = 1
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
        ("format", r"of format 2, got format 1"),
        ("no format", r"of format 2, got format None"),
        ("list", r"of format 2, got list None"),
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


def test_read_takes_a_file_or_its_folder(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert results_.read(tmp_path) == results_.read(tmp_path / "results.json")
    assert results_.read(tmp_path) == results
    with pytest.raises(ValueError, match=r"none.* does not exist"):
        results_.read(tmp_path / "none")
    (tmp_path / "torn.json").write_text('{"format": 2, ')
    with pytest.raises(ValueError, match=r"torn\.json' is not JSON"):
        results_.read(tmp_path / "torn.json")
