"""Directories as other tools and systems leave them."""

import json
import os

import numpy as np
import pytest

from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, open_directory
from tests.support.hf_directories import INDEX, build


def test_an_index_may_list_the_only_file(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")})
    index = {"metadata": {}, "weight_map": {"w": "model.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    assert open_directory(folder).read("w").tolist() == [1, 1]


def test_a_directory_that_cannot_be_read_is_not_left_out_silently(
    tmp_path, monkeypatch
):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")}, **{"a.json": b"{}"})
    (folder / "1_Pooling").mkdir()
    scan = os.scandir

    def closed(path):
        if str(path).endswith("1_Pooling"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="1_Pooling"):
        open_directory(folder)


def test_a_link_to_a_file_that_is_not_there_is_damage(tmp_path):
    folder = build(tmp_path / "m", {"w": np.ones(2, "f4")})
    (folder / "notes.json").symlink_to("missing.json")
    with pytest.raises(Damaged, match=r"notes\.json.*link to what is not there"):
        open_directory(folder)
