"""`jaxprune shrink`: a smaller directory, and what is refused before it is written."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import config_of, run, shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.files import atomic
from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.models import hf


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of several families, two layers and two key heads each; one smaller."""
    root = tmp_path_factory.mktemp("shrink")
    tiny_cli.model(root / "knowing")
    for name in ("llama", "gpt2", "llama-3"):
        tiny_hf.random_folder(name, root / name, "float32")
    np.save(root / "rows.npy", tiny_hf.tokens(6, 16))
    return root


def test_neurons_and_heads_become_fewer(place, capsys):
    code, record, _ = shrink(
        capsys, place / "llama", place / "a", "--ffn", 0.5, "--heads", 0.5
    )
    assert code == 0
    config = config_of(place / "a")
    assert config["intermediate_size"] == 24
    assert config["num_attention_heads"] == 2
    assert config["num_key_value_heads"] == 1
    model = hf.load(place / "a").model
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert record["units"]["after"]["parameters"] == size
    assert record["layers"]["kept"] == [0, 1]
    assert rewrite.read_provenance(place / "a", verify=True)["method"].endswith(
        "magnitude"
    )
    assert run(capsys, "inspect", place / "a")[0] == 0


def test_the_largest_neurons_are_kept(place, capsys):
    code, record, _ = shrink(capsys, place / "llama", place / "b", "--ffn", 0.75)
    assert code == 0
    before, after = tiny_cli.weights(place / "llama"), tiny_cli.weights(place / "b")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp."
        gate, up, down = (
            before[f"{name}{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        score = np.abs(gate).sum(1) + np.abs(up).sum(1) + np.abs(down).sum(0)
        best = np.sort(np.argsort(-score)[:12])
        np.testing.assert_array_equal(after[f"{name}down_proj.weight"], down[:, best])
        kept = record["units"]["kept"][f"layers/{layer}/mlp/down/kernel:0"]
        assert kept == best.tolist()


def test_layers_can_be_named(place, capsys):
    tiny_hf.random_folder("gpt2", place / "deep", "float32", layers=3)
    words = ("--layers", 0, 2)
    assert shrink(capsys, place / "deep", place / "d", *words)[0] == 0
    before, after = tiny_cli.weights(place / "deep"), tiny_cli.weights(place / "d")
    assert config_of(place / "d")["n_layer"] == 2
    name = "mlp.c_fc.weight"
    np.testing.assert_array_equal(
        after[f"transformer.h.1.{name}"], before[f"transformer.h.2.{name}"]
    )


@pytest.mark.full
def test_the_layer_whose_absence_changes_least_goes(place, capsys):
    words = ("--layers", 1, "--calibration", place / "rows.npy", "--length", 16)
    words = (*words, "--sequences", 6, "--batch", 3, "--ffn", 0.5)
    code, record, _ = shrink(capsys, place / "llama", place / "e", *words)
    assert code == 0
    whole = hf.load(place / "llama").model
    params = nnx.state(whole, nnx.Param)
    config, ids = hf.load(place / "llama").config, np.load(place / "rows.npy")

    def logged(kept):
        small, own = hf.keep_layers(config, params, kept)
        model = nnx.merge(nnx.split(hf.abstract(small), nnx.Param)[0], own)
        logits = tiny_cli.called(model, ids[:, :-1])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    dense = logged([0, 1])
    changes = [
        (np.exp(dense) * (dense - logged([1 - gone]))).sum(-1).mean() for gone in (0, 1)
    ]
    assert record["layers"]["dropped"] == [int(np.argmin(changes))]
    np.testing.assert_allclose(record["layers"]["nats"], [min(changes)], rtol=1e-4)
    assert record["method"] == "shrink by the loss without each layer, obs"
    assert hf.load(place / "e").config.layers == 1


@pytest.mark.full
def test_it_is_measured_on_the_ends_of_the_texts(place, capsys):
    (place / "text.txt").write_text(tiny_cli.text(900))
    words = ("--ffn", 0.5, "--calibration", place / "text.txt", "--length", 16)
    words = (*words, "--sequences", 8)
    code, record, _ = shrink(capsys, place / "knowing", place / "h", *words)
    assert code == 0
    measured = record["perplexity"]["text.txt"]
    (place / "end.txt").write_text(" ".join(tiny_cli.text(900).split()[-90:]))
    for stage, folder in (("dense", "knowing"), ("shrunk", "h")):
        words = ("--text", place / "end.txt")
        code, again, _ = run(capsys, "eval", place / folder, *words)
        assert code == 0
        assert measured[stage]["perplexity"] == pytest.approx(
            again["texts"]["end.txt"]["perplexity"], rel=1e-5
        )


@pytest.mark.full
def test_a_search_of_layers_goes_on_where_it_was_killed(place, capsys, monkeypatch):
    tiny_cli.model(place / "three", layers=3)
    words = ("--layers", 1, "--calibration", place / "rows.npy", "--length", 16)
    words = (*words, "--sequences", 6)
    code, whole, _ = shrink(capsys, place / "three", place / "one", *words)
    assert code == 0
    replace, written = atomic.replace_json, []

    def noted(path, content):
        replace(path, content)
        written.append(path.name)

    def dies(path, content):
        noted(path, content)
        if path.name == "layers.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "replace_json", dies)
    code, _, _ = shrink(capsys, place / "three", place / "again", *words)
    assert code == 130
    monkeypatch.setattr(atomic, "replace_json", noted)
    written.clear()
    code, again, _ = shrink(capsys, place / "three", place / "again", *words)
    assert code == 0
    assert written.count("layers.json") == 1
    assert again["layers"] == whole["layers"]
    assert not (place / ".again.work").exists()


def test_an_attribute_that_is_ignored_stays_in_the_config(place, capsys):
    tiny_hf.random_folder("llama", place / "odd", "float32")
    tiny_hf.edit(place / "odd", odd_scale=2.0)
    words = (place / "odd", place / "i", "--ffn", 0.5)
    code, _, err = shrink(capsys, *words)
    assert code == 1
    assert "odd_scale" in err
    assert shrink(capsys, *words, "--ignore-config", "odd_scale")[0] == 0
    assert config_of(place / "i")["odd_scale"] == 2.0


def test_a_budget_is_met(place, capsys):
    words = ("--budget", 0.7)
    code, record, _ = shrink(capsys, place / "llama", place / "f", *words)
    assert code == 0
    assert 0.6 < 1 - record["achieved"] <= 0.7


def test_an_earlier_result_is_replaced_when_asked(place, capsys):
    words = (place / "llama", place / "g", "--ffn", 0.5)
    assert shrink(capsys, *words)[0] == 0
    code, _, err = shrink(capsys, *words)
    assert code == 1
    assert "--overwrite" in err
    assert shrink(capsys, *words, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        ("llama", (), "something must be removed; give --ffn"),
        ("llama", ("--ffn", "1"), r"--ffn must be a share in \[0, 1\), got 1"),
        ("llama", ("--heads", "-0.5"), r"--heads must be a share in \[0, 1\)"),
        ("llama", ("--ffn", "0.999"), "would remove all 48 neurons"),
        (
            "llama",
            ("--heads", "0.9"),
            "must keep a unit, but --heads 0.9 would remove all 2 key heads; give at "
            "most 0.5",
        ),
        ("llama-3", ("--heads", "0.9"), "all 4 query heads; give at most 0.75"),
        (
            "llama-3",
            ("--heads", "0.25"),
            "32, is a multiple of its query heads, but 3 of 4 query heads would be "
            "left; give --heads 0.5 or --heads 0.75",
        ),
        ("llama", ("--heads", "0.5", "--multiple", "8"), "give --ffn or --budget"),
        ("llama", ("--ffn", "0.1", "--multiple", "16"), "leaves all 48 neurons"),
        ("llama", ("--budget", "0.9", "--multiple", "48"), "less than the 48 neurons"),
        ("llama", ("--ffn", "0.5", "--multiple", "0"), "--multiple must be at least 1"),
        ("llama", ("--heads", "0.2"), "2 key heads is less than one .* at least 0.5"),
        ("llama", ("--budget", "2"), "--budget must be a share"),
        ("llama", ("--budget", "0.5", "--ffn", "0.5"), "stands alone, but --ffn"),
        ("llama", ("--budget", "0.05"), "a budget must be within reach"),
        ("llama", ("--layers", "1"), "--layers 1 needs --calibration"),
        (
            "llama",
            ("--layers", "2", "--calibration", "rows.npy", "--length", "16"),
            "less than the 2 that there are",
        ),
        ("llama", ("--layers", "0", "2"), "ascending numbers from 0 to 1, got 0, 2"),
        ("llama", ("--layers", "1", "0"), "ascending numbers from 0 to 1, got 1, 0"),
        ("gpt2", ("--heads", "0.5"), "of model_type gpt2 cannot have fewer heads"),
        (
            "llama",
            ("--ffn", "0.5", "--calibration", "none.txt"),
            "there is no .*none.txt",
        ),
        (
            "llama",
            ("--ffn", "0.5", "--calibration", "rows.npy", "--length", "65"),
            "at most the model's context 64",
        ),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    model, words, told, place, capsys
):
    here = sorted(path.name for path in place.iterdir())
    words = [str(place / w) if w.endswith((".npy", ".txt")) else w for w in words]
    code = cli.main(["shrink", str(place / model), str(place / "free"), *words])
    err = capsys.readouterr().err
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("jaxprune shrink: ")
    assert re.search(told, err)
    assert sorted(path.name for path in place.iterdir()) == here
