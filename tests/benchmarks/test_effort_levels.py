"""The table of efforts: rows of the records that the commands left."""

import json
import statistics

import pytest

pytest.importorskip("tyro")

from benchmarks import commands, effort_levels
from benchmarks.effort_levels import Config
from jaxprune.lm.checkpoints.rewrite import FORMAT, NAME, VERSION


def record(folder, stages, seconds, gigabytes):
    """What a job leaves: perplexities of 2 to 4 times a stage's number, and phases."""
    folder.mkdir()
    texts = {
        f"{name}.txt": {
            stage: {"perplexity": number * times} for stage, number in stages.items()
        }
        for times, name in enumerate(commands.HELD_OUT, 2)
    }
    names = ("read", "prune", "evaluate after")
    phases = [{"name": name, "seconds": seconds} for name in names]
    said = {"format": FORMAT, "version": VERSION, "tensors": {}, "files": {}}
    said |= {"perplexity": texts, "phases": phases}
    said["peak_memory_bytes"] = gigabytes * 10**9
    said |= {"distillation": {}} if "distilled" in stages else {}
    (folder / NAME).write_text(json.dumps(said))


def test_a_level_that_trains_is_measured_after_it_and_pays_for_it(tmp_path):
    record(tmp_path / "quick-0.5", {"dense": 1, "pruned": 10}, 30, 1)
    stages = {"dense": 1, "pruned": 5, "distilled": 3}
    record(tmp_path / "best-0.5", stages, 600, 4)
    config = Config(tmp_path, tmp_path, levels=("quick", "best"), patterns=("0.5",))
    rows = list(effort_levels._rows(config))
    assert [row["effort"] for row in rows] == ["dense", "quick", "best"]
    assert [row["minutes"] for row in rows] == ["", "1", "20"]
    assert [row["peak, GB"] for row in rows] == ["", "1.0", "4.0"]
    mean = statistics.geometric_mean((2, 3, 4))
    for row, number in zip(rows, (1, 10, 3), strict=True):
        assert float(row["news"]) == 4 * number
        assert float(row["mean"]) == pytest.approx(mean * number, abs=0.01)
