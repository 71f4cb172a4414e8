import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import loss_per_token
from jaxprune.lm.recovery import distill, retrain
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=17, context=8, layers=1, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
SEQUENCES = np.random.default_rng(0).integers(0, 17, (4, 8)).astype(np.int32)


def made(seed, **changes):
    """A model whose logits differ from token to token."""
    return initial(dataclasses.replace(CONFIG, **changes), seed, scale=5)


@pytest.fixture(scope="module")
def pair():
    """A teacher, and a student with half of its neurons."""
    return made(0), made(1, mlp_width=4)


@nnx.jit
def logits(model, tokens):
    return model(tokens)


def by_hand(teacher, student, tokens, temperature):
    """KL(teacher || student) of each token, float64."""

    def chances(model):
        z = np.asarray(logits(model, tokens), np.float64) / temperature
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = chances(teacher), chances(student)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize(("temperature", "rows"), [(1.0, None), (2.0, 5), (0.5, 1)])
def test_the_divergence_is_that_of_the_two_distributions(pair, temperature, rows):
    expected = by_hand(*pair, SEQUENCES, temperature)
    found = nnx.jit(
        lambda teacher, student: distill.divergence(
            teacher, student, SEQUENCES, temperature=temperature, rows=rows
        )
    )(*pair)
    assert expected.max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.full
def test_a_student_comes_closer_to_its_teacher(pair):
    teacher, student = pair
    names = set(tree.names(nnx.state(student)))
    settings = retrain.Settings(steps=8, learning_rate=0.05)
    found, losses = retrain.retrain(
        student, names, SEQUENCES, settings, loss=distill.from_teacher(teacher),
        masked=set(),
    )  # fmt: skip
    before, after = (
        by_hand(teacher, model, SEQUENCES[:, :-1], 1.0).mean()
        for model in (student, found)
    )
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert after < losses[-1] < 0.8 * before


@pytest.mark.full
def test_the_text_has_its_share_of_the_loss(pair):
    teacher, student = pair
    loss = distill.from_teacher(teacher, temperature=2.0, text=0.25)
    found = nnx.jit(lambda model: loss.fn(model, loss.arrays, SEQUENCES))(student)
    text = nnx.jit(
        lambda model: loss_per_token(model, SEQUENCES[:, :-1], SEQUENCES[:, 1:]).mean()
    )(student)
    apart = by_hand(teacher, student, SEQUENCES[:, :-1], 2.0).mean()
    assert found == pytest.approx(0.75 * apart + 0.25 * float(text), rel=1e-5)


@pytest.mark.full
def test_the_states_have_their_weight_in_the_loss(pair):
    teacher, student = pair
    loss = distill.from_teacher(teacher, hidden=0.5)
    found = nnx.jit(lambda model: loss.fn(model, loss.arrays, SEQUENCES))(student)
    states = nnx.jit(lambda model: model.states(model.embed(SEQUENCES[:, :-1]))[0])
    theirs, own = (np.asarray(states(model), np.float64) for model in pair)
    distance = ((theirs - own) ** 2).sum(-1) / (theirs**2).sum(-1)
    apart = by_hand(teacher, student, SEQUENCES[:, :-1], 1.0)
    assert found == pytest.approx(apart.mean() + 0.5 * distance.mean(), rel=1e-5)


@pytest.mark.full
def test_layers_that_are_computed_again_give_the_same_gradient(pair):
    """The loss keeps no activations inside layers; `divergence` keeps them all."""
    teacher, student = pair
    loss = distill.from_teacher(teacher)
    graphdef, params = nnx.split(student)

    def again(params):
        return loss.fn(nnx.merge(graphdef, params), loss.arrays, SEQUENCES)

    def kept(params):
        student = nnx.merge(graphdef, params)
        return distill.divergence(teacher, student, SEQUENCES[:, :-1]).mean()

    assert "remat" in str(jax.make_jaxpr(again)(params))
    gradients, expected = (jax.jit(jax.grad(fn))(params) for fn in (again, kept))
    for leaf, other in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)


def test_states_of_another_width_are_refused(pair):
    loss = distill.from_teacher(made(0, width=4), hidden=1.0)
    with pytest.raises(ValueError, match="widths 4 and 8; leave hidden at 0"):
        jax.eval_shape(lambda: loss.fn(pair[1], loss.arrays, SEQUENCES))


def test_another_vocabulary_is_refused(pair):
    other = made(0, vocab_size=18)
    with pytest.raises(ValueError, match="vocabulary of its student, got 18 and 17"):
        jax.eval_shape(lambda: distill.divergence(other, pair[0], SEQUENCES))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"text": 1.5}, "text=1.5"),
        ({"hidden": -1.0}, "hidden=-1"),
    ],
)
def test_a_loss_that_is_none_is_refused(pair, settings, told):
    with pytest.raises(ValueError, match=told):
        distill.from_teacher(pair[0], **settings)
