"""What the main job refuses is one sentence, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import MODULE, flags, snapshot, write_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "tiny.txt")


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--sparsities", "1.0", "sparsities"),
        ("--sparsities", "0.0", "sparsities"),
        ("--sparsities", "-0.5", "sparsities"),
        ("--sparsities", "nan", "sparsities"),
        ("--sparsities", "inf", "sparsities"),
        ("--retrain-sparsities", "1.5", "sparsities"),
        ("--retrain-sparsities", "0.7", "retrain_sparsities"),
        ("--criteria", "weight", "weight"),
        ("--retrain-criteria", "weight", "weight"),
        ("--retrain-criteria", "random", "retrain_criteria"),
        ("--criteria", "random random", "criteria"),
        ("--seeds", "1 1", "seeds"),
        ("--seeds", "-1", "seed"),
        ("--batch-size", "0", "batch_size"),
        ("--steps", "0", "steps"),
        ("--retrain-steps", "-1", "retrain_steps"),
        ("--checkpoint-every", "0", "checkpoint_every"),
        ("--learning-rate", "-0.1", "learning_rate"),
        ("--retrain-learning-rate", "0", "retrain_learning_rate"),
        ("--learning-rate", "0", "learning_rate"),
        ("--learning-rate", "inf", "learning_rate"),
        ("--learning-rate", "nan", "learning_rate"),
        ("--eval-tokens", "-1", "eval_tokens"),
        ("--sample-length", "0", "sample_length"),
        ("--mesh", "rows=2", "as in data=4,model=2"),
        ("--mesh", "data=16", "16 devices, got 8"),
        ("--mesh", "data=4", "batch_size=2"),
        ("--mesh", "model=7", "model=7 must divide"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_and_nothing_is_written(
    text, tmp_path, command, flag, value, named
):
    out = tmp_path / "out"
    status, _, errors = command(*flags(text, out, flag, *value.split()))
    assert status == 1
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


@pytest.mark.full
def test_a_process_that_refuses_prints_one_line_and_exits_with_one(text, tmp_path):
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-m", MODULE, *flags(text, out, "--steps", "0")],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert ended.returncode == 1
    assert not ended.stdout
    assert ended.stderr == "error: steps must be over 0, got 0\n"
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sparsities"],
        ["--sparsities", "half"],
        ["--allocations", "galaxy"],
        ["--preset", "huge"],
        ["--no-such-flag"],
    ],
)
def test_a_flag_that_cannot_be_read_is_a_usage_error(
    text, tmp_path, command, arguments
):
    out = tmp_path / "out"
    status, _, errors = command(*flags(text, out, *arguments))
    assert status not in (0, None)
    assert arguments[0].strip("-").split("-")[0] in errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "must hold text"),
        (b" \n\t\n", "must hold text"),
        (b"to be or not to be", "longer text"),
        (b"x" * 20 + b"y" * 40, "longer text"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_text_of_no_use_is_one_sentence_and_nothing_is_written(
    tmp_path, command, content, named
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        text.write_bytes(content)
    status, _, errors = command(*flags(text, out))
    assert status == 1
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(text, tmp_path, command, name):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    status, _, errors = command(*flags(text, tmp_path / name))
    assert status == 1
    assert errors.startswith("error: ")
    assert str(tmp_path / name) in errors
    assert len(errors.splitlines()) == 1
    assert snapshot(tmp_path) == before


@pytest.mark.full
def test_a_loss_that_is_not_finite_is_one_sentence(text, tmp_path, command):
    status, _, errors = command(*flags(text, tmp_path, "--learning-rate", "1e30"))
    assert status == 1
    error = errors.splitlines()[-1]  # how far it is may stand above
    assert error.startswith("error: ")
    assert "--learning-rate" in error
    assert not (tmp_path / "results.json").exists()
