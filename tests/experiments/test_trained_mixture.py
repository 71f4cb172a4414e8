"""`trained_mixture`: a router's balance, the directory, cells, resuming, tables."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from experiments import trained_mixture
from experiments.datasets import Vocabulary
from experiments.report import mixture_table
from experiments.tasks import expert_mixture
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder
from tests.support.tiny_run import write_text

TINY = trained_mixture.Config(smoke=True).smaller().shape


def test_a_router_of_one_expert_for_all_is_as_uneven_as_there_are_experts():
    probabilities = jnp.eye(4)[jnp.zeros(6, int)]  # (tokens, experts)
    assert expert_mixture.imbalance(probabilities, jnp.zeros((6, 1), int)) == 4
    even = jnp.full((4, 4), 0.25)
    assert expert_mixture.imbalance(even, jnp.arange(4)[:, None]) == 1
    # sum of f_e P_e = 3/4 x 0.7 + 1/4 x 0.1, the other experts are chosen by none
    probabilities = jnp.tile(jnp.array([0.7, 0.1, 0.1, 0.1]), (4, 1))
    chosen = jnp.array([[0], [0], [0], [1]])
    np.testing.assert_allclose(
        expert_mixture.imbalance(probabilities, chosen), 4 * (0.525 + 0.025), rtol=1e-6
    )


def test_the_directory_is_read_back_bit_for_bit_and_its_tokens_are_characters(tmp_path):
    vocabulary = Vocabulary.of("to be, or not to be\n")
    config_json = TINY.config_json(len(vocabulary), dense=False)
    model = Decoder(hf.decoder_config(config_json), rngs=nnx.Rngs(0))
    expert_mixture.write_directory(tmp_path / "mixture", model, config_json, vocabulary)
    loaded = hf.load(tmp_path / "mixture")
    assert loaded.config == model.config
    before, after = (
        jp.tree.named_leaves(nnx.state(m, nnx.Param)) for m in (model, loaded.model)
    )
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name])
    tokenizer = hf.load_tokenizer(tmp_path / "mixture")
    text = "not to\nbe"
    assert tokenizer.encode(text) == vocabulary.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_dense_model_has_as_many_weights_in_its_mlps():
    sizes = {}
    for dense in (False, True):
        config = hf.decoder_config(TINY.config_json(8, dense=dense))
        leaves = jp.tree.named_leaves(nnx.state(hf.abstract(config), nnx.Param))
        inside = [x.size for n, x in leaves.items() if trained_mixture._inside_mlp(n)]
        sizes[dense] = sum(inside), len(inside)
    assert sizes[True] == sizes[False] == (4 * 3 * 16 * 8, 3)


def test_the_table_holds_a_cell_against_the_whole_model_of_its_seed():
    def row(seed, model, loss, recovered=None, **cell):
        fields = dataclasses.asdict(trained_mixture.Cell(seed, model, **cell))
        removed = trained_mixture.Cell(seed, model, **cell).removed
        return fields | {"removed": removed, "loss": loss, "recovered": recovered}

    half = {"ranking": "reap", "experts": 0.5}
    pruned = {"method": "wanda", "sparsity": 0.5}
    results = {
        "config": {"recover_steps": 7},
        "routing": {"0": {"tokens": [[1, 3]]}, "1": {"tokens": [[2, 2]]}},
        "cells": [
            row(0, "mixture", 2.0),
            row(1, "mixture", 3.0),
            row(0, "mixture", 2.5, 2.1, **half),
            row(1, "mixture", 3.7, 3.3, **half),
            row(0, "mixture", 4.0, 3.0, **half, **pruned),
            row(0, "dense", 1.0),
            row(0, "dense", 1.25, **pruned),
        ],
    }
    report = mixture_table.report(results)
    assert report.tables[0].rows == [
        ["50%", "experts", "reap", "+0.600 ± 0.141", "+0.200 ± 0.141", "-"],
        ["50%", "weights", "wanda", "-", "-", "+0.250"],
        ["75%", "both", "reap, wanda", "+2.000", "+1.000", "-"],
    ]
    assert report.facts["mixture"] == "2.500 ± 0.707"
    assert report.facts["share of the tokens of an expert"] == "0.250 to 0.750"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    text = write_text(folder / "tiny.txt")
    # The dense model is one more training to compile, by the same code.
    return trained_mixture.Config(
        out=folder / "out", text=text, models=("mixture",), smoke=True
    )


@pytest.mark.full
def test_a_run_has_each_cell_once_and_goes_on_after_the_last(config, monkeypatch):
    # Of the recovery is the next test; each compiles a training step.
    monkeypatch.setattr(trained_mixture.Run, "recovered", lambda *args: args[2])
    results = json.loads(trained_mixture.main(config).read_text())
    requested = [*config.smaller().cells(0)]
    cells = {trained_mixture.Cell(**_settings(cell)) for cell in results["cells"]}
    assert cells == set(requested)
    assert len(results["cells"]) == len(requested) == 4
    # Without half of the experts it is trained on; so little pruning is not worth it.
    trained = [cell for cell in results["cells"] if cell["recovered"] is not None]
    assert [cell["experts"] for cell in trained] == [0.5, 0.5]
    # One cell is lost: it alone is made again, to the same loss.
    requested[1].path(config.out).unlink()
    monkeypatch.setattr(trained_mixture.Run, "without_experts", None)
    again = json.loads(trained_mixture.main(config).read_text())
    assert again["cells"] == results["cells"]


@pytest.mark.full
def test_what_recovers_keeps_its_zeros_and_its_experts(config):
    run = trained_mixture.Run(config.smaller(), trained_mixture.load(text=config.text))
    cell = trained_mixture.Cell(0, "mixture", "reap", 0.5, "magnitude", 0.5)
    whole = run.trained(0, "mixture")
    model = run.pruned(cell, run.without_experts(cell, whole))
    after = run.recovered(cell, model, whole)
    assert model.config.experts == after.config.experts == 2
    named = jp.tree.named_leaves(after.params)
    for name, leaf in jp.tree.named_leaves(model.params).items():
        if trained_mixture._inside_mlp(name):
            assert np.mean(leaf == 0) == 0.5
            np.testing.assert_array_equal(named[name] == 0, leaf == 0)
            assert (named[name] != leaf).any()


def _settings(cell):
    names = [field.name for field in dataclasses.fields(trained_mixture.Cell)]
    return {name: cell[name] for name in names}


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("rankings", ("reap", "fair"), "rankings must be of reap"),
        ("methods", ("obs",), "methods must be of magnitude"),
        ("sequences", 20, "sequences must be a multiple of 16"),
        ("recover_steps", 0, "recover_steps must be at least 1, got 0"),
    ],
)
def test_what_could_only_fail_later_is_refused_first(field, value, match, tmp_path):
    config = trained_mixture.Config(out=tmp_path / "new", **{field: value})
    with pytest.raises(ValueError, match=match):
        trained_mixture.main(config)
    assert not (tmp_path / "new").exists()
