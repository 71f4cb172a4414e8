"""A run that is killed or fails while it writes loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxprune.files import atomic
from jaxprune.files.sink import Sink
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, open_directory
from tests.support.hf_directories import (
    INDEX,
    build,
    contents,
    llama,
)
from tests.support.rewritten import HOW, Q, half
from tests.support.rewritten import source as source


def test_a_run_that_dies_while_replacing_loses_neither(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    rewrite.write_directory(source, out, {}, provenance=HOW)
    before = contents(out)
    rename = os.rename

    def dies(old, new):
        if Path(new) == out:
            raise KeyboardInterrupt
        rename(old, new)

    # As after a power cut: nothing runs that could bring the old one back.
    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        rewrite.write_directory(source, out, {}, provenance=HOW, overwrite=True)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(ValueError, match="there is something already"):
        rewrite.write_directory(source, out, {}, provenance=HOW)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]


@pytest.mark.parametrize("failing", ["shard", "copy", "record", "sync"])
def test_a_crash_anywhere_leaves_nothing_half_written(
    tmp_path, source, monkeypatch, failing
):
    def crash(*_, **__):
        raise RuntimeError("crash")

    where, name = {
        "shard": (Sink, "put"),
        "copy": (rewrite, "copy_file"),
        "record": (atomic, "replace_json"),
        "sync": (atomic, "sync"),
    }[failing]
    monkeypatch.setattr(where, name, crash)
    with pytest.raises(RuntimeError, match="crash"):
        rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW)
    assert os.listdir(tmp_path) == ["m"]


def test_what_a_dead_run_left_is_cleared(tmp_path, source):
    left = tmp_path / ".out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW)
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]
    assert "folder" not in os.listdir(tmp_path / "out")


def test_two_runs_do_not_write_to_one_place(tmp_path, source):
    def second():
        rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW)

    with pytest.raises(OSError, match="another run writes to"):
        rewrite.write_directory(source, tmp_path / "out", {Q: second}, provenance=HOW)


def test_a_file_cut_under_way_is_damaged(tmp_path):
    tensors = {"a": np.ones(4, "f4"), "b": np.ones(1 << 20, "f4")}
    source = open_directory(build(tmp_path / "m", tensors))

    def cut():
        os.truncate(tmp_path / "m" / "model.safetensors", 1 << 20)
        return tensors["a"]

    with pytest.raises(Damaged, match="shorter"):
        rewrite.write_directory(source, tmp_path / "out", {"a": cut}, provenance=HOW)
    assert os.listdir(tmp_path) == ["m"]


def test_a_stopped_run_goes_on_after_its_finished_files(tmp_path):
    source = open_directory(build(tmp_path / "m", llama(), 3))
    by_file = {info.file: name for name, info in source.tensors.items()}
    called = []

    def values(name, stop):
        if stop:
            raise KeyboardInterrupt
        called.append(name)
        return half(source.read(name))

    def run(stop=None, out="out", how=HOW):
        new = {n: lambda n=n: values(n, n == stop) for n in by_file.values()}
        rewrite.write_directory(
            source, tmp_path / out, new, provenance=how, resume=True
        )

    first, second, third = (by_file[file] for file in source.metadata)
    with pytest.raises(KeyboardInterrupt):
        run(stop=third)
    assert not (tmp_path / "out").exists()
    # One finished file is damaged since: it is made again, the other is not.
    with open(tmp_path / ".out.partial" / list(source.metadata)[1], "r+b") as file:
        file.write(b"\0")
    called.clear()
    run()
    assert called == [second, third]
    run(out="whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["m", "out", "whole"]
    # Another job begins anew.
    with pytest.raises(KeyboardInterrupt):
        run(stop=third, out="other")
    called.clear()
    run(out="other", how={**HOW, "sparsity": 0.25})
    assert called == [first, second, third]


def test_a_state_of_another_job_begins_anew(tmp_path, source):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / ".state.json").write_text("{}")
    rewrite.write_directory(source, tmp_path / "out", {}, provenance=HOW, resume=True)
    written = contents(tmp_path / "out")
    del written["jaxprune.json"]
    assert written == contents(tmp_path / "m")


def test_a_killed_process_leaves_no_lock_and_no_result(tmp_path):
    build(tmp_path / "m", llama(), 2)
    code = f"""
import os, sys
from jaxprune.lm.checkpoints import checkpoint_dir, rewrite
source = checkpoint_dir.open_directory({str(tmp_path / "m")!r})
name = list(source.tensors)[-1]
new = {{name: lambda: os._exit(9)}}
out = {str(tmp_path / "out")!r}
rewrite.write_directory(source, out, new, provenance={{}}, resume=True)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "m"]
    source = open_directory(tmp_path / "m")
    rewrite.write_directory(source, tmp_path / "out", {}, provenance={})
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
