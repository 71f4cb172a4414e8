"""`--plan` says what would be done and writes nothing; what a directory decides."""

import json

import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import place, run
from tests.support.tiny_families import MIXTURES

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.files import atomic
from jaxprune.lm import cli
from jaxprune.lm.models.loaded_model import LoadedModel

__all__ = ["place"]

FAMILIES = [n for n in (*tiny_hf.CONFIGS, *MIXTURES) if "-" not in n]
SMALL = ["--length", "16", "--sequences", "8"]
HALF = ["--sparsity", "0.5"]


@pytest.fixture
def nothing_read_or_written(monkeypatch, place):
    """No weight is read, and nothing is written anywhere near."""
    before = sorted(place.rglob("*"))

    def read(self):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(LoadedModel, "read", read)
    monkeypatch.setattr(atomic, "locked", read)
    yield
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_the_plan_of_a_pruning_is_what_would_be_pruned(
    place, capsys, nothing_read_or_written, method
):
    words = ["prune", place / "model", place / "out", *HALF, "--plan", *SMALL]
    words += ["--method", method, "--exclude", "*.k_proj.*"]
    if method != "magnitude":
        words += ["--calibration", place / "a.txt"]
    code, found, _ = run(capsys, *words)
    assert code == 0
    wanted = {
        name.replace(".0.", ".*."): [1, list(shape), shape[0] * shape[1]]
        for name, shape in tiny_cli.MATRICES.items()
        if "k_proj" not in name
    }
    assert {
        row["tensor"]: [row["count"], row["shape"], row["weights"]]
        for row in found["plan"]
    } == wanted
    assert (found["method"], found["sparsity"]) == (method, 0.5)


def test_the_plan_for_people_names_texts_and_what_is_left_alone(
    place, capsys, nothing_read_or_written
):
    words = ["prune", place / "model", place / "out", *HALF, *SMALL, "--plan"]
    words += ["--calibration", place / "a.txt", place / "b.txt"]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "7,680 weights in 7 matrices would be pruned by sparsegpt" in said
    assert "left alone: 1 (named as an output head)" in said
    assert "sequences of 16 tokens: a.txt 4, b.txt 4" in said
    assert "a.txt (held out from calibration)" in said
    assert "nothing was written" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--calibration", "none.txt"], "there is no none.txt"),
        (["--exclude", "*.nothing", "--method", "magnitude"], "must match"),
        (["--method", "magnitude", "--pattern", "7:14"], "divisible by 14"),
    ],
)
def test_a_plan_refuses_what_the_job_would_refuse(
    place, capsys, monkeypatch, nothing_read_or_written, words, told
):
    monkeypatch.chdir(place)
    code, _, err = run(capsys, "prune", "model", "out", *HALF, "--plan", *words)
    assert code == 1
    assert told in err


def test_the_plan_of_a_shrinking_is_the_smaller_shape(
    place, capsys, nothing_read_or_written
):
    words = ["shrink", place / "model", place / "out", "--ffn", "0.25", "--plan"]
    code, found, _ = run(capsys, *words, "--heads", "0.5")
    assert code == 0
    assert found["plan"] == {
        "layers": [1, 1],
        "neurons a layer": [48, 36],
        "heads a layer": [2, 1],
    }
    assert cli.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "neurons a layer" in said
    assert said.endswith("nothing was written\n")
    words = ["shrink", place / "model", place / "out", "--budget", "0.9", "--plan"]
    assert cli.main([*map(str, words)]) == 0
    assert "90.0% of the parameters would be left" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_a_plan_of_what_inspect_calls_prunable(
    place, tmp_path, capsys, name
):
    layers = None if name in ("llama", "gemma3") else 1
    tiny_hf.random_folder(name, tmp_path, layers=layers)
    tiny_cli.tokenizer(tmp_path)
    words = ["prune", tmp_path, tmp_path.with_name("out"), *HALF, *SMALL, "--plan"]
    code, found, _ = run(capsys, *words, "--calibration", place / "a.txt")
    assert code == 0
    prunable = run(capsys, "inspect", tmp_path)[1]["totals"]["prunable"]
    assert sum(row["weights"] for row in found["plan"]) == prunable


# ---- what the directory decides


def test_a_family_without_code_is_pruned_by_magnitude(place, tmp_path, capsys):
    model = tiny_cli.model(tmp_path / "model")
    tiny_hf.edit(model, model_type="unheard_of")
    code, found, err = run(capsys, "prune", model, tmp_path / "out", *HALF)
    assert (code, found["method"]) == (0, "magnitude")
    assert "the code of model_type unheard_of is not here" in err
    # Where a text is given, magnitude alone is not what was meant.
    words = ["--calibration", place / "a.txt", "--length", "16"]
    code, _, err = run(capsys, "prune", model, tmp_path / "other", *HALF, *words)
    assert code == 1
    assert "unheard_of" in err


def test_a_short_context_shortens_sequences_that_nobody_asked_for(
    place, capsys, nothing_read_or_written
):
    words = ["prune", place / "model", place / "out", *HALF, "--plan"]
    words += ["--calibration", place / "a.txt", "--sequences", "8"]
    assert cli.main([str(word) for word in words]) == 0
    assert "sequences of 64 tokens" in capsys.readouterr().out
    config = json.loads((place / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64


def test_a_short_context_shortens_windows_that_nobody_asked_for(place, capsys):
    words = ["eval", place / "model", "--text", place / "a.txt", "--limit", "1"]
    code, found, _ = run(capsys, *words)
    assert (code, found["texts"]["a.txt"]["context"]) == (0, 64)
