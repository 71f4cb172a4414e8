"""Pruning while training: the schedule, exact counts, resuming, refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxprune as jp
from experiments import gpt, prune_while_training
from experiments.harness import training
from experiments.tasks.language_model import LanguageModel
from tests.support.tiny_run import write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deeper")
    write_text(folder / "tiny.txt")
    return prune_while_training.Config(
        out=folder / "out",
        text=folder / "tiny.txt",
        sparsities=(0.0, 0.5),
        steps=12,
        restart=4,
        prune_every=2,
        batch_size=2,
        eval_tokens=256,
    )


@pytest.fixture(scope="module")
def finished(config):
    """The losses of a whole run, and the parameters at each sparsity."""
    run, params = prune_while_training.run, {}

    def keeping(*arguments):
        params[arguments[-1]] = run(*arguments)
        return params[arguments[-1]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_while_training, "run", keeping)
        results = json.loads(prune_while_training.main(config).read_text())
    return results["losses"], params


@pytest.fixture(scope="module")
def losses(finished):
    return finished[0]


def test_the_cubic_ends_at_the_target_and_never_falls():
    targets = prune_while_training.Config(steps=1000, prune_every=50).targets(0.8)
    assert min(targets) > 200
    assert max(targets) == 600
    assert targets[600] == 0.8
    assert np.all(np.diff(list(targets.values())) > 0)
    # Zhu and Gupta, 2017, equation 1, half way: 1 - (1/2)^3 of the target.
    np.testing.assert_allclose(targets[400], 0.8 * 7 / 8)


def test_the_target_is_hit_off_the_grid_too():
    assert (
        prune_while_training.Config(steps=997, prune_every=60).targets(0.8)[598] == 0.8
    )


def test_pruned_weights_are_exactly_as_many_as_asked_for(finished):
    counted = jp.sparsity(jp.scores.magnitude(finished[1][0.5]))
    assert counted.zeros == round(0.5 * counted.size)


@pytest.mark.full
def test_a_run_cut_between_segments_ends_with_the_same_bits(
    config, losses, tmp_path, monkeypatch
):
    again = dataclasses.replace(config, out=tmp_path)
    train, calls = training.train, []

    def dies_later(*args, **kwargs):
        calls.append(kwargs["steps"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(training, "train", dies_later)
    with pytest.raises(KeyboardInterrupt):
        prune_while_training.main(again)
    assert not (tmp_path / "results.json").exists()
    assert json.loads(prune_while_training.main(again).read_text())["losses"] == losses


def test_a_finished_run_trains_no_more(config, losses, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    assert json.loads(prune_while_training.main(config).read_text())["losses"] == losses


def test_distilling_mixes_cross_entropy_with_the_divergence_from_the_teacher():
    model = LanguageModel(gpt.preset("cpu", vocab_size=7, layers=1, width=8, heads=1))
    student, teacher = model.init(0), jax.tree.map(lambda x: 30 * x, model.init(1))
    inputs, targets = np.arange(6).reshape(1, 6), np.arange(6)[::-1].reshape(1, 6)
    args = (student, inputs, targets, jax.random.key(0))
    mixed = prune_while_training.distilled(model, teacher, 0.25, *args)

    def probabilities(params):
        logits = np.asarray(model.bind(params)(inputs), np.float64)
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    p, q = probabilities(teacher), probabilities(student)
    divergence = (p * np.log(p / q)).sum(-1).mean()
    entropy = -np.log(np.take_along_axis(q, targets[..., None], -1)).mean()
    assert divergence > 0.01
    np.testing.assert_allclose(mixed, 0.75 * entropy + 0.25 * divergence, rtol=1e-4)


@pytest.mark.full
def test_a_distilled_run_learns_from_the_dense_one_of_its_seed(
    config, losses, tmp_path
):
    own = dataclasses.replace(config, out=tmp_path, distill=0.5)
    taught = json.loads(prune_while_training.main(own).read_text())["losses"]["0"]
    assert taught["0"] == losses["0"]["0"]
    assert taught["0.5"] != losses["0"]["0.5"]


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_a_sparsity_out_of_range_is_refused_before_anything_is_written(
    config, sparsity, tmp_path
):
    own = dataclasses.replace(config, out=tmp_path / "new", sparsities=(sparsity,))
    with pytest.raises(ValueError, match="sparsities must be in"):
        prune_while_training.main(own)
    assert not (tmp_path / "new").exists()


def test_another_learning_rate_in_the_same_folder_is_refused(config, losses):
    own = dataclasses.replace(config, learning_rate=1e-4)
    with pytest.raises(ValueError, match="learning_rate was"):
        prune_while_training.main(own)


@pytest.mark.parametrize("recipe", ["cosine", "restart"])
def test_the_learning_rate_peaks_where_the_recipe_says(recipe):
    config = prune_while_training.Config(recipe=recipe)
    rates = np.asarray(jax.vmap(config.rate())(np.arange(config.steps)))
    np.testing.assert_allclose(rates.max(), config.learning_rate, rtol=1e-3)
    expected = [100] if recipe == "cosine" else [100, 2050]
    peaks = np.flatnonzero((rates[1:-1] > rates[:-2]) & (rates[1:-1] >= rates[2:])) + 1
    assert peaks.tolist() == expected
