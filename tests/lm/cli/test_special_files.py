"""Named pipes and sockets in a model's directory: never opened, and listed."""

import os
import shutil
import signal
import socket

import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import place as place
from tests.support.tiny_cli import run

pytest.importorskip("tokenizers")


@pytest.fixture
def no_hang():
    """Ends a test that waits for a writer."""

    def end(*_):
        raise TimeoutError("a named pipe was opened")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(place, tmp_path, monkeypatch):
    """A directory with a pipe where a licence is, a link to one, and a socket."""
    shutil.copytree(place / "model", tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "README.md")
    (tmp_path / "model" / "LICENSE").symlink_to("README.md")
    monkeypatch.chdir(tmp_path / "model")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("notes.txt")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--method", "magnitude", "--sparsity", "0.5"],
        ["shrink", "--ffn", "0.5"],
    ],
)
def test_only_regular_files_are_copied_and_the_others_are_listed(
    model, tmp_path, capsys, no_hang, words
):
    out = tmp_path / "out"
    code, _, err = run(capsys, words[0], model, out, *words[1:])
    assert code == 0
    assert "not copied: LICENSE, README.md, notes.txt" in err
    assert not {"LICENSE", "README.md", "notes.txt"} & set(os.listdir(out))


def test_what_is_no_file_is_not_packed(model, tmp_path, capsys, no_hang):
    code, result, err = run(capsys, "compact", model, tmp_path / "file")
    assert code == 0
    assert result["omitted"] == ["LICENSE", "README.md", "notes.txt"]
    assert "no files, are not in it: LICENSE, README.md, notes.txt" in err
    assert run(capsys, "expand", tmp_path / "file", tmp_path / "new")[0] == 0


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_settings_that_are_a_pipe_are_not_read(model, place, capsys, no_hang, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for words in (
        ["inspect", model],
        ["sample", model, "--prompt", "w5", "--steps", 1],
        ["eval", model, "--text", place / "rows.npy"],
    ):
        assert run(capsys, *words)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_needed_file_that_is_a_pipe_is_refused(model, capsys, no_hang, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    code, _, err = run(capsys, "sample", model, "--prompt", "w5")
    assert code == 1
    assert err.startswith("jaxprune sample: ")


def test_an_earlier_result_with_a_pipe_is_not_replaced(
    place, tmp_path, capsys, no_hang
):
    words = ["prune", place / "model", tmp_path / "out", "--method", "magnitude"]
    assert run(capsys, *words, "--sparsity", "0.5")[0] == 0
    os.mkfifo(tmp_path / "out" / "pipe")
    code, _, err = run(capsys, *words, "--sparsity", "0.6", "--overwrite")
    assert code == 1
    assert "it also holds 'pipe'" in err
    assert tiny_cli.weights(tmp_path / "out")
