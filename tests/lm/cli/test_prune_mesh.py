"""`jaxprune prune --mesh`: eight devices, or two processes, make the same file."""

import signal
import time

import numpy as np
import pytest

from tests.support import resumed, tiny_cli
from tests.support.tiny_cli import run
from tests.support.two_processes import JOINED, started, two

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

OPTIONS = [
    *("--length", "16"),
    *("--sequences", "32"),
    *("--sparsity", "0.5"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and token ids."""
    root = tmp_path_factory.mktemp("mesh")
    tiny_cli.model(root / "model")
    (root / "a.txt").write_text(tiny_cli.text(900))
    np.save(root / "rows.npy", tiny_cli.ids(32 * 16, seed=2).reshape(32, 16))
    return root


def words(place, out):
    texts = ["--calibration", place / "rows.npy", "--evaluate", place / "a.txt"]
    options = [*OPTIONS, "--method", "wanda"]
    return ["prune", place / "model", place / out, *options, *texts]


@pytest.fixture(scope="module")
def alone(place):
    """What one device makes."""
    from jaxprune.lm import cli

    assert cli.main([*map(str, words(place, "alone")), "--json"]) == 0
    return (place / "alone" / "model.safetensors").read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=8"])
def test_a_model_over_a_mesh_is_that_of_one_device(place, alone, capsys, mesh):
    code, found, err = run(capsys, *words(place, mesh), "--mesh", mesh)
    assert code == 0, err
    assert (place / mesh / "model.safetensors").read_bytes() == alone
    for text in found["perplexity"].values():
        assert 1 < text["dense"]["perplexity"] < 30


@pytest.mark.full
def test_two_processes_make_the_same_file_and_one_of_them_speaks(place, alone):
    mesh = ["--mesh", "data=2,fsdp=4", *JOINED]
    command = ["-m", "jaxprune", *words(place, "two"), *mesh]
    first, second = two(command, place, devices=4)
    assert (place / "two" / "model.safetensors").read_bytes() == alone
    assert "50.0000% of the 7,680 weights of" in first
    assert "perplexity" not in second
    assert not (place / ".two.work").exists()
    record = (place / "two" / "jaxprune.json").read_text()
    assert "--mesh data=2,fsdp=4" in record


@pytest.mark.full
def test_what_two_processes_left_is_ended_by_one_on_another_layout(
    place, alone, capsys, monkeypatch
):
    mesh = ["--mesh", "data=2,fsdp=4", *JOINED]
    command = ["-m", "jaxprune", *words(place, "killed"), *mesh]
    work = place / ".killed.work"
    with started(command, place, devices=4) as both:
        end = time.monotonic() + 300
        while not list(work.glob("segment_00001.json")) and time.monotonic() < end:
            assert both[0].poll() is None, (place / "log-0").read_text()
            time.sleep(0.01)
        for process in both:
            process.send_signal(signal.SIGKILL)
    assert len(list(work.glob("segment*"))) >= 4
    found = resumed.reads(monkeypatch)
    code, _, err = run(capsys, *words(place, "killed"), "--mesh", "fsdp=8")
    assert code == 0, err
    assert (place / "killed" / "model.safetensors").read_bytes() == alone
    assert found[:2] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=16"], "data=16 needs 16 devices, got 8; give smaller sizes"),
        (["--mesh", "rows=2"], "--mesh must name each of data, fsdp once at most"),
        (["--mesh", "fsdp=3"], "--sequences must be divisible by 3 x --batch 4, got"),
        (["--distributed"], "the processes could not be joined ("),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    place, capsys, options, message
):
    before = set(place.iterdir())
    code, _, err = run(capsys, *words(place, "refused"), *options)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert set(place.iterdir()) == before


def test_a_size_that_divides_no_parameter_is_refused(place, capsys):
    before = set(place.iterdir())
    options = ["--mesh", "fsdp=7", "--sequences", "28"]
    code, _, err = run(capsys, *words(place, "refused"), *options)
    assert code == 1
    assert "fsdp=7 of --mesh must divide an axis of a parameter" in err
    assert set(place.iterdir()) == before
