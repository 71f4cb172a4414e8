"""The set of benchmarks for an accelerator: runs, goes on, names what fails."""

import importlib
import json
import sys

import pytest
import tyro

from benchmarks import accelerator
from benchmarks.accelerator import Config


@pytest.mark.full
def test_every_line_is_a_file_and_is_not_made_again(tmp_path, monkeypatch, capsys):
    config = Config(out=tmp_path, smoke=True)
    accelerator.main(config)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["device"] for line in lines] == ["cpu"] * len(accelerator.SMALL)
    names = {path.name for path in (tmp_path / "smoke").iterdir()}
    assert names == {f"{name}.jsonl" for name in accelerator.SMALL}
    monkeypatch.setattr(accelerator.subprocess, "run", None)
    accelerator.main(config)
    assert capsys.readouterr().err.count("done before") == len(accelerator.SMALL)


def test_one_that_fails_is_named_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    small = {"broken": "no_such_benchmark", "right": "right"}
    monkeypatch.setattr(accelerator, "SMALL", small)
    run = accelerator.subprocess.run

    def either(words, **options):
        if words[2] == "benchmarks.right":
            words = [sys.executable, "-c", 'print(\'{"device": "a"}\')']
        return run(words, **options)

    monkeypatch.setattr(accelerator.subprocess, "run", either)
    with pytest.raises(SystemExit, match="failed: broken; start again"):
        accelerator.main(Config(out=tmp_path, smoke=True))
    assert [path.name for path in (tmp_path / "smoke").iterdir()] == ["right.jsonl"]
    assert "broken: failed with status 1" in capsys.readouterr().err


def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match=r"--only must be of tracking_step, .* speed"):
        accelerator.main(Config(out=tmp_path / "out", only=("speed",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", accelerator.SET.values(), ids=accelerator.SET)
def test_the_flags_are_those_of_the_benchmarks(line, tmp_path):
    module, *words = line.format(place=tmp_path).split()
    config = importlib.import_module(f"benchmarks.{module}").Config
    assert isinstance(tyro.cli(config, args=words), config)
