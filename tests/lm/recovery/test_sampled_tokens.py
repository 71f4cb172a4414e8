import dataclasses

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxprune.lm as lm
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.recovery import predictions, sampled_tokens
from jaxprune.lm.steps import recover
from tests.support import tiny_hf
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=80, context=8, layers=1, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
SEQUENCES = np.random.default_rng(0).integers(0, 4, (4, 8)).astype(np.int32)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_were_drawn_stand_for_all_that_nothing_names(
    tied, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampled_tokens, "OTHERS", 3)
    config = dataclasses.replace(CONFIG, tie_weights=tied)
    teacher, student = (initial(config, seed, scale=5) for seed in (0, 1))
    kept = predictions.keep_predictions(teacher, SEQUENCES, tmp_path, top=1, batch=3)
    ids, log_p = kept.rows(np.arange(4))
    sampler = sampled_tokens.sampler_of(80, SEQUENCES, kept.likeliest, batch=3)
    text = np.array([0, 0.25, 1, 0])
    loss = predictions.from_predictions(kept, text=text, sampler=sampler)
    rows = np.array([1, 2, 0])
    sample, *_ = arrays = loss.read(rows)
    assert len(sample.ids) == sampler.size
    named = np.isin(np.arange(80), [*SEQUENCES[rows].flat, *ids[rows].flat])
    value = nnx.jit(loss.fn)(student, arrays, SEQUENCES[rows])
    again, *_ = loss.read(rows)
    np.testing.assert_array_equal(again.ids, sample.ids)  # a resumed run's too

    inputs, targets = SEQUENCES[rows, :-1], SEQUENCES[rows, 1:]
    logits = np.asarray(nnx.jit(lambda m, x: m(x))(student, inputs), np.float64)
    # Of the tokens that nothing names the drawn ones, as often as makes up for all.
    drawn = np.isin(np.arange(80), sample.ids) & ~named
    assert set(np.flatnonzero(named)) <= set(sample.ids)
    assert drawn.sum() >= 3
    counts = np.where(named, 1, np.where(drawn, (~named).sum() / drawn.sum(), 0))
    with np.errstate(divide="ignore"):
        log_q = log_softmax(logits + np.log(counts))
    of_text = -np.take_along_axis(log_q, targets[..., None], -1)[..., 0].mean(1)
    likeliest = np.take_along_axis(log_q, ids[rows], -1)
    rest = np.log(1 - np.exp(likeliest).sum(-1, keepdims=True))
    log_q, log_p = np.concatenate([likeliest, rest], -1), log_p[rows]
    followed = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)
    expected = ((1 - text[rows]) * followed + text[rows] * of_text).mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_the_drawn_ones_add_up_to_all_others_on_average():
    exponentials = np.random.default_rng(0).exponential(size=40)
    named = np.arange(40) < 9
    sums = []
    for seed in range(400):
        ids, log_counts = sampled_tokens.draw_tokens(named, 14, seed=seed)
        assert ids[:9].tolist() == [*range(9)]
        assert len(set(ids)) == 14
        sums.append((exponentials[ids] * np.exp(log_counts)).sum())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - exponentials.sum()) < 4 * error


def test_most_of_a_vocabulary_is_no_sample(monkeypatch):
    sequences = np.array([[0, 1, 2, 0], [3, 4, 4, 4], [5, 6, 7, 8]])
    monkeypatch.setattr(sampled_tokens, "OTHERS", 13)
    assert sampled_tokens.sampler_of(40, sequences, batch=2).size == 20
    assert sampled_tokens.sampler_of(40, sequences, batch=3) is None


def test_each_step_draws_tokens_of_its_own(monkeypatch):
    monkeypatch.setattr(sampled_tokens, "OTHERS", 5)
    sampler = sampled_tokens.sampler_of(40, SEQUENCES, batch=2)
    first, second = (sampler.draw(np.array(rows)).ids for rows in ([0, 1], [2, 3]))
    assert set(first) != set(second)


def few_others(monkeypatch):
    """Draws so few tokens that a tiny vocabulary is drawn from."""
    monkeypatch.setattr(sampled_tokens, "OTHERS", 8)


def recovered(folder, trained, monkeypatch, mesh=None, batch=2):
    """The leaves before and after, and the record of the training."""
    monkeypatch.setattr(recover, "TOP", 1)
    np.save(folder / "rows.npy", SEQUENCES)
    # With seed 0 one gradient is next to zero, and Adam takes its sign alone.
    texts = lm.texts(folder / "rows.npy", length=8, sequences=4, batch=batch, seed=1)
    model = lm.open(folder, mesh=mesh)
    options = {"steps": 3, "learning_rate": 1e-2, "train": trained, "text_share": 0.5}
    after = lm.recover(model, texts, teacher=model, **options)
    leaves = [load_file(made.path / "model.safetensors") for made in (model, after)]
    return *leaves, after.record["training"]


@pytest.mark.full
@pytest.mark.parametrize(("trained", "sampled"), [("matrices", True), ("all", False)])
def test_a_recovery_leaves_tokens_that_it_did_not_see(
    trained, sampled, tmp_path, monkeypatch
):
    few_others(monkeypatch)
    tiny_hf.random_folder("llama", tmp_path / "model", "float32")
    before, after, record = recovered(tmp_path / "model", trained, monkeypatch, batch=1)
    assert (record["logits"] is not None, record["batch"]) == (sampled, 1)
    for name, leaf in before.items():
        assert after[name].shape == leaf.shape
        trained_here = trained == "all" or "proj" in name
        assert (after[name] != leaf).any() == trained_here, name


@pytest.mark.full
def test_tokens_are_drawn_of_a_model_on_a_mesh(tmp_path, monkeypatch):
    few_others(monkeypatch)
    tiny_hf.random_folder("llama", tmp_path / "model", "float32")
    _, alone, _ = recovered(tmp_path / "model", "matrices", monkeypatch)
    _, split, record = recovered(
        tmp_path / "model", "matrices", monkeypatch, mesh="fsdp=2"
    )
    assert "logits" in record
    for name, leaf in alone.items():
        np.testing.assert_allclose(split[name], leaf, rtol=1e-4, atol=1e-5)
