"""Pictures as batches: what is seen, what is asked, what counts."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import jaxprune as jp
from experiments.datasets import picture_questions, preprocess, presets
from experiments.phi3_vision.checkpoint import vision_config
from experiments.phi3_vision.question_answers import Asked
from experiments.phi3_vision.task import PictureTask, without_gradient
from experiments.phi3_vision.vision_model import VisionModel


@pytest.fixture(scope="module")
def task():
    config = vision_config(presets.PRESETS["smoke"])
    config = dataclasses.replace(config, crops=2)
    parts = picture_questions.parts(picture_questions.read_source())
    train, held_out = (
        [Asked(*picture_questions.example(parts[split], i)) for i in range(count)]
        for split, count in (("train", 40), ("validation", 70))
    )
    tokenizer = presets.tokenizer()
    return PictureTask(VisionModel(config), tokenizer, train, held_out)


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(lambda: task.init(0))()


@pytest.fixture(scope="module")
def token_losses(task):
    return jax.jit(task.token_losses)


def _words(examples):
    return sum(len(asked.answer.split()) for asked in examples)


@pytest.mark.full
def test_fresh_matrices_keep_the_variance_of_what_comes_in(params):
    """Each has deviation inputs^-1/2; its sample, within five standard errors."""
    for name, leaf in jp.tree.named_leaves(params).items():
        if name.endswith(("kernel", "patch_embedding")):
            expected = (leaf.size / leaf.shape[-1]) ** -0.5
            within = 5 * (2 * leaf.size) ** -0.5
            assert np.asarray(leaf).std() == pytest.approx(expected, rel=within), name


def test_a_model_to_start_from_is_taken_as_it_is(task):
    start = {"decoder": {"kernel": np.ones((2, 2))}}
    model = VisionModel(task.model.config, start=lambda: start)
    assert model.init(0) is start


@pytest.mark.full
def test_a_packed_batch_says_what_each_prompt_says(task, params, token_losses):
    """Each example alone, through the model itself, gives the batch's losses."""
    inputs, targets, weights = task.packed(task.train[:4])
    batch = token_losses(params, inputs, targets)
    model = jax.jit(lambda params, *prompt: task.model.bind(params)(*prompt))
    for i, asked in enumerate(task.train[:3]):
        text = preprocess.chat(asked.question, 1) + asked.answer + "<|end|>"
        made = preprocess.prompt(
            text,
            [Image.fromarray(asked.picture)],
            task.tokenizer.encode,
            task.model.config,
            bos=task.tokenizer.bos,
        )
        # Longer than it is, so that all are of one shape: what follows is not seen.
        length = len(made.tokens)
        tokens, sources = (
            np.pad(x, (0, task.length + 1 - length), mode="edge")[None]
            for x in (made.tokens, made.sources)
        )
        logits = np.asarray(model(params, tokens, made.pixels, sources)[0], np.float64)
        nats = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
        words = len(asked.answer.split())
        last = range(length - words - 1, length)
        expected = [nats[i - 1, made.tokens[i]] for i in last]
        counted = np.asarray(batch[i])[targets[i] >= 0]
        np.testing.assert_allclose(counted, expected, rtol=1e-4, atol=1e-5)
        answer = made.tokens[-words - 1 : -1].tolist()
        assert targets[i][weights[i] > 0].tolist() == answer
        assert task.tokenizer.decode(answer) == asked.answer


@pytest.mark.full
def test_the_loss_is_the_mean_of_the_answers_and_their_ends(task, params, token_losses):
    inputs, targets, _ = task.packed(task.train[:4])
    losses = np.asarray(token_losses(params, inputs, targets))
    counted = _words(task.train[:4]) + 4
    assert (targets >= 0).sum() == counted
    got = jax.jit(task.loss)(params, inputs, targets, None)
    np.testing.assert_allclose(got, losses.sum() / counted, rtol=1e-6)


def test_a_batch_is_a_function_of_seed_and_step(task):
    one, other, later = (task.batches(4, 3)(step)[0]["tokens"] for step in (5, 5, 6))
    np.testing.assert_array_equal(one, other)
    assert (one != later).any()
    assert (one != task.batches(4, 4)(5)[0]["tokens"]).any()


def test_validation_counts_every_held_out_answer_once(task):
    batches = task.validation(32, None)
    assert len(batches) == 3
    assert sum(weights.sum() for *_, weights in batches) == _words(task.held_out)
    few = task.validation(32, 10 * task.length)
    assert sum(weights.sum() for *_, weights in few) == _words(task.held_out[:10])


@pytest.mark.full
def test_accuracy_is_the_share_of_likeliest_words_that_are_right(task, params):
    right = task.right(params, task.held_out)
    by_hand = []

    @jax.jit
    def likeliest(params, inputs):
        states = task.model.states(params, inputs)
        return task.model.bind(params).decoder.logits(states)[0].argmax(-1)

    for asked in task.held_out[:5]:
        inputs, targets, weights = task.packed([asked])
        places = np.flatnonzero(weights[0])
        guessed = np.asarray(likeliest(params, inputs))
        by_hand.append(all(guessed[i] == targets[0, i] for i in places))
    np.testing.assert_array_equal(right[:5], by_hand)
    measured = task.measured(params, 0.0, lambda *_: 0.0)
    assert measured["accuracy"] == right.mean()
    asked = [example.question for example in task.held_out]
    assert measured["by_question"].keys() == {*asked}
    for question, share in measured["by_question"].items():
        matches = [r for r, q in zip(right, asked, strict=True) if q == question]
        assert share == pytest.approx(sum(matches) / len(matches))


def test_without_pictures_the_usual_answer_is_the_best(task):
    accuracy = task.text_only()["accuracy"]
    table = {}
    for asked in task.train:
        table.setdefault(asked.question, []).append(asked.answer)
    right = 0
    for asked in task.held_out:
        counts = table[asked.question]
        best = max(counts, key=lambda a: (counts.count(a), -counts.index(a)))
        right += best == asked.answer
    assert accuracy == pytest.approx(right / len(task.held_out))


@pytest.mark.full
def test_what_gets_no_gradient_is_never_ranked(task, params):
    inputs, targets, _ = task.packed(task.train[:8])
    gradients = jax.jit(jax.grad(task.loss))(params, inputs, targets, None)
    gradients = jax.device_get(gradients)
    still = {n for n, g in jp.tree.named_leaves(gradients).items() if not g.any()}
    assert still
    rules = {name: rule for name, (_, rule) in task.allocations.items()}
    named = jp.tree.named_leaves(params)
    chosen = {s: {n for n, x in named.items() if r(n, x)} for s, r in rules.items()}
    assert not chosen["all"] & still
    assert chosen["tower"] | chosen["decoder"] < chosen["all"]
    assert not chosen["tower"] & chosen["decoder"]
    outside = chosen["all"] - chosen["tower"] - chosen["decoder"]
    assert outside == {"project_in/kernel", "project_out/kernel"}
    assert {*without_gradient(task)} == still


def test_a_sample_shows_pictures_with_what_was_asked_and_said(task, params):
    sample = task.shown(params, "dense", 1)
    assert sample["label"] == "dense"
    assert len(sample["pictures"]) == 8
    assert sample["text"].splitlines()[0].startswith(task.held_out[0].question)


def test_an_empty_training_set_is_refused(task):
    with pytest.raises(ValueError, match="got none"):
        dataclasses.replace(task, train=[]).batches(2, 0)


def test_the_pictures_change_what_is_said(task, params, token_losses):
    inputs, targets, _ = task.packed(task.train[:4])
    grey = {**inputs, "pixels": np.zeros_like(inputs["pixels"])}
    one, other = (
        np.asarray(token_losses(params, x, targets)).sum() for x in (inputs, grey)
    )
    assert one != other
