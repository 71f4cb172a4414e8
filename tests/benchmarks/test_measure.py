import types

import pytest

from benchmarks import measure
from jaxprune.arrays import console_progress


def test_candidates_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.interleaved(functions, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_long_measurements_say_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr(console_progress, "_SECONDS", 0.0)
    assert list(measure.progress(["x", "y"], "timing", "cell")) == ["x", "y"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "timing: 1 of 2 cells",
        "timing: 2 of 2 cells",
    ]


@pytest.mark.parametrize("name", ["work", "table.csv"])
def test_results_of_other_settings_are_not_taken_for_these(tmp_path, name):
    def begin(steps):
        settings = types.SimpleNamespace(steps=steps, seeds=(0, 1))
        measure.begin(tmp_path / name, settings, "steps", "seeds")

    begin(4)
    begin(4)
    with pytest.raises(SystemExit, match="steps was 4 and is 5"):
        begin(5)
