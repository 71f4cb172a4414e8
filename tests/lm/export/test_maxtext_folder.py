"""The folder of MaxText's checkpoint: what may be replaced, what is refused."""

import json

import pytest

from jaxprune.lm import cli
from tests.support.trainer_folders import pruned_folder

pytest.importorskip("orbax.checkpoint")


@pytest.fixture
def model(tmp_path):
    return pruned_folder("llama", tmp_path / "model")


@pytest.mark.parametrize("foreign", ["notes.txt", "100"])
def test_a_folder_of_more_than_an_export_is_never_replaced(model, tmp_path, foreign):
    out = tmp_path / "out"
    export = ["export", str(model), "--maxtext", str(out), "--overwrite"]
    assert cli.main(export) == 0
    assert cli.main(export) == 0  # an earlier one is replaced
    (out / foreign).mkdir()
    assert cli.main(export) == 1
    assert (out / foreign).is_dir()


def test_a_file_of_the_same_name_makes_no_export(model, tmp_path, capsys):
    out = tmp_path / "project"
    out.mkdir()
    (out / "student.yml").write_text("mine: 1")
    assert cli.main(["export", str(model), "--maxtext", str(out), "--overwrite"]) == 1
    assert "it has no '0'" in capsys.readouterr().err
    assert (out / "student.yml").read_text() == "mine: 1"


def test_a_model_without_a_type_is_refused_in_a_sentence(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    assert cli.main(["export", str(model), "--maxtext", str(tmp_path / "out")]) == 1
    assert "model_type" in capsys.readouterr().err
