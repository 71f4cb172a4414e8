"""Which directories go through torch, and what is said where it is not installed."""

import json

import numpy as np
import pytest

from jaxprune.lm import cli
from jaxprune.lm.torch_models import routing
from tests.support import tiny_cli, tiny_hf

pytest.importorskip("tyro")


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A directory of no family of ours, where torch is not installed."""
    monkeypatch.setattr(routing, "missing_packages", lambda: ["torch", "torchax"])
    folder = tiny_cli.model(tmp_path / "model")
    tiny_hf.edit(folder, model_type="bert", architectures=["BertForMaskedLM"])
    (tmp_path / "text.txt").write_text(tiny_cli.text(400))
    return folder


@pytest.mark.parametrize(
    ("config", "foreign"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, True),
        # A directory that is both is read by the family of ours.
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, False),
        ({"model_type": "bert"}, False),
        ({"model_type": ["bert"], "architectures": ["BertModel"]}, False),
        ({"architectures": "BertModel"}, False),
        ({}, False),
    ],
)
def test_what_names_a_class_and_is_no_family_of_ours_is_foreign(config, foreign):
    assert routing.is_foreign(config) == foreign


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--sparsity", "0.5", "--calibration", "text.txt"],
        ["prune", "--sparsity", "0.5", "--method", "wanda"],
        ["prune", "--sparsity", "0.5", "--effort", "quick"],
        ["shrink", "--ffn", "0.5"],
        ["eval", "--text", "text.txt"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_without_torch_one_sentence_names_the_extra(
    foreign, monkeypatch, capsys, words
):
    monkeypatch.chdir(foreign.parent)
    command, *options = words
    places = ["model"] if command == "eval" else ["model", "out"]
    assert cli.main([command, *places, *options]) == 1
    err = capsys.readouterr().err
    assert "model_type bert is no family of jaxprune's" in err
    assert "torch and torchax is not installed; pip install '.[transformers]'" in err
    assert err.count("\n") == 1
    assert {path.name for path in foreign.parent.iterdir()} == {"model", "text.txt"}


def test_without_torch_magnitude_prunes_and_inspect_says_what_is_missing(
    foreign, capsys
):
    out = foreign.parent / "out"
    assert cli.main(["prune", str(foreign), str(out), "--sparsity", "0.5"]) == 0
    weight = tiny_cli.weights(out)["model.layers.0.mlp.up_proj.weight"]
    assert np.mean(weight == 0) == 0.5
    capsys.readouterr()
    assert cli.main(["inspect", str(foreign), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == ["magnitude"]
    assert "pip install '.[transformers]'" in found["unsupported"]


@pytest.mark.parametrize("option", ["--metric", "--dense"])
def test_options_of_models_through_torch_are_refused_for_families_of_ours(
    tmp_path, capsys, option
):
    tiny_cli.model(tmp_path / "model")
    words = ["eval", str(tmp_path / "model"), "--text", "x.txt", option, "a:b"]
    assert cli.main(words) == 1
    assert f"{option} is for models that go through torch" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said_to_be_so_whatever_else_is_asked(
    tmp_path, capsys
):
    words = ["eval", str(tmp_path / "none"), "--text", str(tmp_path)]
    assert cli.main([*words, "--dense", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "none" in err
    assert "--dense" not in err
    assert "texts" not in err


def test_a_folder_is_no_text_of_a_family_of_ours_and_is_called_one(tmp_path, capsys):
    folder = tiny_cli.model(tmp_path / "model")
    assert cli.main(["eval", str(folder), "--text", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"texts must be files, but {tmp_path} are folders" in err
    assert "there is no" not in err
