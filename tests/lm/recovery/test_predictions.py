import dataclasses
import os

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import loss_per_token
from jaxprune.lm.recovery import checkpoints, distill, predictions, retrain
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=17, context=8, layers=1, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
SEQUENCES = np.random.default_rng(0).integers(0, 17, (5, 8)).astype(np.int32)


@pytest.fixture(scope="module")
def pair():
    """A teacher, and a student with half of its neurons."""
    smaller = dataclasses.replace(CONFIG, mlp_width=4)
    return initial(CONFIG, 0, scale=5), initial(smaller, 1, scale=5)


def gradient(loss, model, arrays, tokens):
    """A loss and its gradient in all parameters, float64."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def both(params, arrays, tokens):
        return jax.value_and_grad(
            lambda params: loss(nnx.merge(graphdef, params), arrays, tokens)
        )(params)

    value, gradients = both(params, arrays, tokens)
    named = tree.named_leaves(gradients)
    return float(value), {k: np.asarray(x, np.float64) for k, x in named.items()}


def of_outcomes(teacher, student, tokens, top):
    """The mean divergence over the teacher's likeliest and the sum of all others."""
    p, q = (
        np.asarray(jax.nn.softmax(nnx.jit(lambda m, x: m(x))(model, tokens)), float)
        for model in (teacher, student)
    )
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    p, q = (
        np.concatenate([x[..., :top], x[..., top:].sum(-1, keepdims=True)], axis=-1)
        for x in (p, q)
    )
    return (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.full
def test_the_loss_is_the_divergence_over_the_likeliest_and_all_others(pair, tmp_path):
    rows = np.array([4, 0, 3])
    values = []
    for top in (3, 16):
        kept = predictions.keep_predictions(
            pair[0], SEQUENCES, tmp_path / str(top), top=top, batch=2
        )
        loss = predictions.from_predictions(kept)
        value, found = gradient(loss.fn, pair[1], loss.read(rows), SEQUENCES[rows])
        expected = of_outcomes(*pair, SEQUENCES[rows, :-1], top)
        assert value == pytest.approx(expected, rel=1e-5)
        values.append(value)
    assert 0.01 < values[0] < 0.99 * values[1]
    # A text that is learned alone, beside others that are followed.
    shares = np.array([0, 1, 1, 0, 0.25])
    mixed = predictions.from_predictions(kept, text=shares)
    value, _ = gradient(mixed.fn, pair[1], mixed.read(rows), SEQUENCES[rows])
    inputs, targets = SEQUENCES[rows, :-1], SEQUENCES[rows, 1:]
    of_text = np.asarray(nnx.jit(loss_per_token)(pair[1], inputs, targets)).mean(1)
    followed = [of_outcomes(*pair, tokens[None], 16) for tokens in inputs]
    expected = (1 - shares[rows]) * followed + shares[rows] * of_text
    assert value == pytest.approx(expected.mean(), rel=1e-5)
    # 16 and one other are all 17 tokens, so the gradient is that of the teacher.
    whole = distill.from_teacher(pair[0])
    value, expected = gradient(whole.fn, pair[1], whole.arrays, SEQUENCES[rows])
    assert values[1] == pytest.approx(value, rel=1e-5)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6)


def test_predictions_are_made_once_and_belong_to_their_teacher(pair, tmp_path):
    done = []

    def dies(sequences):
        done.append(sequences)
        if len(done) == 2:
            raise KeyboardInterrupt

    args = (pair[0], SEQUENCES, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        predictions.keep_predictions(*args, batch=2, progress=dies)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    kept = predictions.keep_predictions(*args, batch=2)
    assert (sorted(kept.places), kept.batch) == ([0, 1, 2, 3, 4], 2)
    # Linux allows 1024 open files: none stays open.
    before = len(os.listdir("/proc/self/fd"))
    rows = kept.rows(np.array([0, 2, 4]))
    assert [part.shape for part in rows] == [(3, 7, 16), (3, 7, 17)]
    del rows
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    # 16 of 17 tokens are the most; the rest is headers.
    assert 0 <= size - 5 * 7 * (8 * 16 + 4) < 3 * 256
    with pytest.raises(ValueError, match="another job: start"):
        predictions.keep_predictions(pair[1], SEQUENCES, tmp_path, batch=2)


def test_equal_sequences_are_predicted_once_and_texts_never(pair, tmp_path):
    apart = predictions.keep_predictions(pair[0], SEQUENCES, tmp_path / "apart")
    order, done = np.array([3, 0, 3, 1, 4]), []
    followed = np.array([True, False, True, True, False])
    kept = predictions.keep_predictions(
        *(pair[0], SEQUENCES[order], tmp_path / "kept"),
        followed=followed, progress=done.append,
    )  # fmt: skip
    files = list((tmp_path / "kept").glob("*.safetensors"))
    assert [size // (7 * (8 * 16 + 4)) for size in map(_size, files)] == [2]
    assert sum(done) == 5
    for part, expected in zip(kept.rows(np.arange(5)), apart.rows(order), strict=True):
        np.testing.assert_array_equal(part[followed], expected[followed])
        assert not part[~followed].any()
    predictions.from_predictions(kept, text=~followed)
    with pytest.raises(ValueError, match="but 2 were not predicted; give"):
        predictions.from_predictions(kept, text=0.9)
    nothing = predictions.keep_predictions(
        pair[0], SEQUENCES, tmp_path / "none", followed=np.zeros(5, bool)
    )
    learned = predictions.from_predictions(nothing, text=1.0)
    value, _ = gradient(learned.fn, pair[1], learned.read(np.arange(5)), SEQUENCES)
    by_text = retrain.from_text()
    expected, _ = gradient(by_text.fn, pair[1], by_text.arrays, SEQUENCES)
    assert value == pytest.approx(expected, rel=1e-6)


def _size(path):
    return path.stat().st_size


@pytest.mark.full
def test_a_killed_training_goes_on_to_the_same_bits(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.Checkpoints, "due", lambda self: True)
    teacher, student = pair
    kept = predictions.keep_predictions(teacher, SEQUENCES, tmp_path / "kept", top=5)
    names = set(tree.names(nnx.state(student)))
    settings = retrain.Settings(steps=6, learning_rate=0.05, batch=3)

    def dies(steps, loss):
        raise KeyboardInterrupt

    def trained(**options):
        model, losses = retrain.retrain(
            student, names, SEQUENCES, settings, masked=set(),
            loss=predictions.from_predictions(kept), **options,
        )  # fmt: skip
        return tree.named_leaves(nnx.state(model)), losses

    expected, losses = trained()
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(KeyboardInterrupt):
        trained(directory=tmp_path / "steps", progress=dies)
    leaves, again = trained(directory=tmp_path / "steps")
    assert again == losses
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_another_vocabulary_and_shares_that_are_none_are_refused(pair, tmp_path):
    kept = predictions.keep_predictions(pair[0], SEQUENCES, tmp_path)
    loss = predictions.from_predictions(kept._replace(vocab_size=18))
    with pytest.raises(ValueError, match="vocabulary of its student, got 18 and 17"):
        jax.eval_shape(lambda: loss.fn(pair[1], loss.read(np.arange(2)), SEQUENCES[:2]))

    for shares in (1.5, np.zeros(4)):
        with pytest.raises(ValueError, match="one for each of the 5 sequences"):
            predictions.from_predictions(kept, text=shares)


@pytest.mark.parametrize("settings", [{"top": 0}, {"batch": 0}])
def test_no_predictions_are_refused(pair, tmp_path, settings):
    with pytest.raises(ValueError, match="keep_predictions needs at least one"):
        predictions.keep_predictions(pair[0], SEQUENCES, tmp_path, **settings)
