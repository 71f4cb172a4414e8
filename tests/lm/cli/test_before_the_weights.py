"""What is told before any weight is read, and in the words of the command."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.support import hf_directories, tiny_cli, tiny_hf
from tests.support.tiny_cli import place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.cli import inspect as inspect_command
from jaxprune.lm.measure import machine
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.steps import passes, prune_streaming

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "8"]
HALF = ["--method", "wanda", "--sparsity", "0.5"]


@pytest.fixture
def no_weights(monkeypatch):
    """A model whose weights cannot be read."""

    def read(self):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(LoadedModel, "read", read)


def edited(place, tmp_path, **changes):
    """A copy of the model with other attributes in its config.json."""
    shutil.copytree(place / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "model"


@pytest.mark.parametrize("bos", [97, 131, -1, 2**40])
@pytest.mark.parametrize("command", ["eval", "prune", "sample"])
def test_a_bos_outside_of_the_vocabulary_is_refused(
    place, tmp_path, capsys, no_weights, command, bos
):
    model = edited(place, tmp_path, bos_token_id=bos)
    tiny_cli.tokenizer(model, template=False, bos_token=None)
    words = {
        "eval": ["eval", model, "--text", place / "a.txt"],
        "prune": [
            "prune", model, tmp_path / "out", *SMALL, *HALF, "--calibration",
            place / "a.txt",
        ],
        "sample": ["sample", model, "--prompt", "w4"],
    }[command]  # fmt: skip
    code, _, err = run(capsys, *words, "--bos", "yes")
    assert code == 1
    assert f"begin with BOS ({bos}), as asked for, but the model's" in err
    assert "tokens from 0 to 96" in err
    assert "--bos no" in err


def test_attributes_that_are_ignored_are_named(place, tmp_path, capsys):
    model = edited(place, tmp_path, my_note="x", gating="fancy")
    words = ["eval", model, "--text", place / "rows.npy"]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "gating='fancy' is not known; give --ignore-config ATTRIBUTE if the" in err
    assert "my_note" not in err
    code, found, err = run(capsys, *words, "--ignore-config", "gating")
    assert code == 0
    assert found["ignored_config"] == ["gating", "my_note"]
    assert "of config.json not looked at: gating, my_note" in err
    _, plain, _ = run(capsys, "eval", place / "model", "--text", place / "rows.npy")
    assert found["texts"] == plain["texts"]


def test_the_work_of_another_job_is_refused_before_the_model_is_measured(
    place, tmp_path, capsys, monkeypatch, no_weights
):
    def prune(*options):
        return run(
            capsys, "prune", place / "model", tmp_path / "out", *SMALL, *HALF,
            "--calibration", place / "a.txt", *options,
        )  # fmt: skip

    with pytest.raises(AssertionError, match="weights are read"):
        prune()
    # Nothing was done yet: nothing is left, and another job may have the place.
    assert not (tmp_path / ".out.work").exists()
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "segment_00000.json").write_text("{}")
    with pytest.raises(AssertionError, match="weights are read"):
        prune("--seed", "1")
    code, _, err = prune("--seed", "2")
    assert code == 1
    assert "belongs to another job: seed was 1 and is 2" in err
    versions = {**machine.versions(), "jaxprune": "9.9"}
    monkeypatch.setattr(machine, "versions", lambda: versions)
    code, _, err = prune("--seed", "1")
    assert code == 1
    assert "and is '9.9'" in err


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_disk_without_room_is_told_first(
    place, tmp_path, capsys, monkeypatch, no_weights, method
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9999))
    words = ["prune", place / "model", tmp_path / "out", *SMALL, "--sparsity", "0.5"]
    words += ["--method", method, "--evaluate", place / "a.txt"]
    words += ["--calibration", place / "a.txt"] if method == "wanda" else []
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "must have room for" in err
    assert "but 9,999 are free" in err
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_a_pattern_does_not_fit_is_refused_with_exclude(place, capsys):
    words = ["prune", place / "model", place / "free", "--method", "magnitude"]
    code, _, err = run(capsys, *words, "--pattern", "3:7")
    assert code == 1
    assert "leave such tensors out with --exclude '...'" in err


def test_weights_of_one_byte_are_no_weights_to_prune(place, tmp_path, capsys):
    model = edited(place, tmp_path)
    narrow = {
        name: value.astype(ml_dtypes.float8_e4m3fn)
        for name, value in tiny_cli.tensors().items()
    }
    hf_directories.save(model / "model.safetensors", narrow)
    _, found, _ = run(capsys, "inspect", model)
    reasons = {row["name"]: row["why"] for row in found["tensors"]}
    assert {reasons[name] for name in tiny_cli.MATRICES} == {"of one byte a weight"}
    words = ["--method", "magnitude", "--sparsity", "0.5"]
    code, _, err = run(capsys, "prune", model, tmp_path / "out", *words)
    assert code == 1
    assert "all of its tensors are left alone" in err
    assert "of one byte a weight" in err
    first, *others = tiny_cli.MATRICES
    some = tiny_cli.tensors() | {name: narrow[name] for name in others}
    hf_directories.save(model / "model.safetensors", some)
    code, record, err = run(capsys, "prune", model, tmp_path / "out", *words)
    assert (code, list(record["tensors"])) == (0, [first]), err


@pytest.mark.parametrize("word", ["2:4", "8x4", "unstructured", "per-output"])
def test_patterns_are_written_as_they_are_asked_for(word):
    from jaxprune.masking import patterns

    assert passes.pattern_word(patterns.parse(word)) == word


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    version = importlib.metadata.version("jaxprune")
    assert capsys.readouterr().out == f"jaxprune {version}\n"


def test_a_closed_stdout_is_no_failure(place, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["inspect", str(place / "model")]) == 0
    assert "Broken" not in capsys.readouterr().err


@pytest.mark.full
def test_a_closed_stderr_stops_no_job(place, tmp_path):
    read, write = os.pipe()
    os.close(read)
    words = ["--method", "magnitude", "--sparsity", "0.5"]
    command = [sys.executable, "-m", "jaxprune", "prune", "model", tmp_path / "out"]
    with os.fdopen(write, "w") as closed:
        for more, code in (([], 0), (["--seed", "-1"], 1)):
            done = subprocess.run(
                [*command, *words, *more, "--overwrite"],
                cwd=place, stdout=subprocess.DEVNULL, stderr=closed,
            )  # fmt: skip
            assert done.returncode == code
    assert (tmp_path / "out" / "jaxprune.json").is_file()


@pytest.mark.full
def test_a_refusal_leaves_the_progress_of_a_later_job(place, tmp_path, capsys):
    words = ["prune", place / "model", tmp_path / "out", "--method", "magnitude"]
    assert run(capsys, *words, "--sparsity", "0.5")[0] == 0
    later = tmp_path / ".out.work"
    later.mkdir()
    (later / "command.json").write_text("{}")
    assert run(capsys, *words, "--sparsity", "0.5")[0] == 1
    assert (later / "command.json").is_file()
    made = (tmp_path / "out" / "jaxprune.json").stat().st_mtime - 5
    os.utime(later / "command.json", (made, made))
    assert run(capsys, *words, "--sparsity", "0.5")[0] == 1
    assert not later.exists()


def test_a_disk_that_is_mounted_is_no_place_for_a_result(place, capsys, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    words = ["prune", place / "model", place / "volume", "--method", "magnitude"]
    code, _, err = run(capsys, *words, "--sparsity", "0.5")
    assert code == 1
    assert "give a directory inside it" in err
    assert not (place / "volume").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--group", "64"], "--group needs --quantize"),
    ],
)
def test_options_without_what_they_are_for_are_refused(place, capsys, words, told):
    code, _, err = run(
        capsys, "prune", place / "model", place / "free", "--sparsity", "0.5", *words
    )
    assert code == 1
    assert told in err


def test_what_jax_refuses_is_one_sentence(place, capsys, monkeypatch):
    def failed(*_, **__):
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(inspect_command, "open_directory", failed)
    code, _, err = run(capsys, "inspect", place / "model")
    assert code == 1
    assert err == "jaxprune inspect: Unable to initialize backend 'cuda'\n"


@pytest.mark.full
def test_head_ends_a_listing_without_an_error(place):
    command = f"{sys.executable} -m jaxprune inspect model | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tensor")


def test_folders_of_the_model_come_along_and_what_does_not_is_named(
    place, tmp_path, capsys
):
    model = edited(place, tmp_path)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / "modules.json").write_text("[]")  # as sentence-transformers writes
    dense = np.ones((3, 2), np.float32)
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").write_text("{}")
    hf_directories.save(model / "2_Dense" / "model.safetensors", {"w": dense})
    (model / "old").mkdir()
    np.save(model / "old" / "weights.npy", np.ones(3))
    words = ["prune", model, tmp_path / "out", "--method", "magnitude"]
    code, found, err = run(capsys, *words, "--sparsity", "0.5")
    assert code == 0
    assert "not copied: old/weights.npy" in err
    assert "1_Pooling/config.json" in found["files"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    module = Path("2_Dense", "model.safetensors")
    assert (tmp_path / "out" / module).read_bytes() == (model / module).read_bytes()
    assert found["pattern"] == "unstructured"
    code, _, err = run(capsys, *words, "--sparsity", "0.5")
    assert code == 1
    assert "is whole, and this very command made it" in err
    assert tiny_cli.weights(tmp_path / "out").keys() == tiny_cli.tensors().keys()


def test_a_streamed_pruning_looks_at_its_texts_first(
    place, tmp_path, capsys, monkeypatch
):
    def read(source):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(prune_streaming, "nonfinite_tensors", read)
    np.save(tmp_path / "foreign.npy", np.full((1, 16), 97, np.int32))
    words = ["prune", place / "model", tmp_path / "out", "--method", "magnitude"]
    words += ["--sparsity", "0.5", "--length", "16"]
    code, _, err = run(capsys, *words, "--evaluate", tmp_path / "foreign.npy")
    assert code == 1
    assert "foreign.npy" in err


@pytest.fixture
def shrinking(tmp_path):
    """The words that shrink a model of two layers, and its number of parameters."""
    tiny_hf.random_folder("llama", tmp_path / "model", "float32")
    np.save(tmp_path / "rows.npy", tiny_hf.tokens(8, 16))
    words = ["shrink", tmp_path / "model", tmp_path / "out", *SMALL[:4]]
    words += ["--calibration", tmp_path / "rows.npy"]
    leaves = tiny_cli.weights(tmp_path / "model").values()
    return words, sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("0.1",), "^jaxprune shrink: a budget must be within reach, but 0.1 of"),
        (("0.1", "--layers", "1"), "--budget chooses what goes, so it stands alone"),
    ],
)
def test_a_budget_that_the_shapes_forbid_is_refused(
    shrinking, capsys, no_weights, options, message
):
    code, _, err = run(capsys, *shrinking[0], "--budget", *options)
    assert code == 1
    assert re.search(message, err)


@pytest.mark.full
def test_the_smallest_model_of_a_refusal_can_be_had(shrinking, capsys):
    words, whole = shrinking
    words = [*words, "--budget"]
    _, _, err = run(capsys, *words, 0.01)
    least = int(re.search(r"allow has ([\d,]+)", err)[1].replace(",", ""))
    assert run(capsys, *words, (least - 1) / whole)[0] == 1
    code, record, _ = run(capsys, *words, (least + 1) / whole)
    assert code == 0
    assert record["sizes"]["after"]["parameters"] == least
