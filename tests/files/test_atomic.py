import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxprune.files import atomic
from jaxprune.files.sink import Sink


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        if target.name == "a.txt":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.replace_files(tmp_path, {"b.txt": b"b", "a.txt": b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.txt": "old",
        "b.txt": "b",
    }


def test_a_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        atomic.replace_files(tmp_path / "file", {"a.txt": b""})


def test_json_that_is_no_json_leaves_the_old_file(tmp_path):
    atomic.replace_json(tmp_path / "a.json", {"loss": 0.5})
    for wrong in ({"loss": np.nan}, {"loss": object()}):
        with pytest.raises((ValueError, TypeError)):
            atomic.replace_json(tmp_path / "a.json", wrong)
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 0.5}


def test_a_job_goes_on_in_its_own_directory_and_another_is_refused(tmp_path):
    path = tmp_path / "new" / "job.json"
    job = {"sizes": (1, 2), "data": {"seed": 0}}
    assert not atomic.begin_or_resume(path, job)
    assert atomic.begin_or_resume(path, job)
    with pytest.raises(ValueError, match=r"new' belongs to another job: data.seed was"):
        atomic.begin_or_resume(path, {**job, "data": {"seed": 1}})
    for damaged in ("{", "[1]", ""):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"job.json' is damaged"):
            atomic.begin_or_resume(path, job)


def test_every_difference_between_two_jobs_is_named():
    found = atomic.differences({"a": 1, "b": {"c": [1]}}, {"b": {"c": (1, 2)}, "d": 0})
    assert found == [
        "a was 1 and is 'absent'",
        "b.c was [1] and is [1, 2]",
        "d was 'absent' and is 0",
    ]


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    run = tmp_path / "run"
    with (
        atomic.locked(run),
        pytest.raises(OSError, match="another run writes to"),
        atomic.locked(run),
    ):
        pass
    with atomic.locked(run):
        pass


def test_a_place_that_cannot_be_written_to_or_has_no_room_is_refused(monkeypatch):
    with pytest.raises(OSError, match="/proc"):
        atomic.check_room(Path("/proc/a/b"), 1)
    with pytest.raises(OSError, match="must have room for 1,000,000,000,000,000,000"):
        atomic.check_room(Path("/tmp/a/b"), 10**18)
    atomic.check_room(Path("/tmp/a/b"), 1)


def test_a_disk_that_is_full_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '/dev/full'"),
        Sink(Path("/dev/full")) as sink,
    ):
        sink.put(b"abc")


def test_a_file_in_the_place_of_a_directory_is_refused_before_it_is_written(tmp_path):
    (tmp_path / "place").mkdir()
    with (
        pytest.raises(ValueError, match="is a directory; give the name of a file"),
        atomic.staged_file(tmp_path / "place"),
    ):
        raise AssertionError("the block runs")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize("staged", [atomic.staged, atomic.staged_file])
def test_what_appears_in_the_place_meanwhile_stays(tmp_path, staged):
    place = tmp_path / "out"
    taken = pytest.raises(FileExistsError, match="there is something already")
    with taken, staged(place) as partial:
        if staged is atomic.staged_file:
            partial.write_text("new")
        place.mkdir()
        (place / "thesis.txt").write_text("precious")
    assert (place / "thesis.txt").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


def test_a_result_does_not_take_the_place_of_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="or this process runs"):
        atomic.check_free(tmp_path, None)
    atomic.check_free(tmp_path / "out", None)


def test_an_empty_directory_does_not_cost_the_result_that_was_moved_aside(tmp_path):
    # A run died between its two renames; the script that starts the next makes OUT.
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "model").write_text("old")
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OSError, match="disk"),
        atomic.staged(tmp_path / "out", replaceable=lambda place: None),
    ):
        raise OSError("disk")
    assert (tmp_path / "out" / "model").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
