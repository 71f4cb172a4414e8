"""The pictures with questions: from real digits and photographs, each answer seen."""

import numpy as np
import pytest

from experiments.datasets import picture_questions as questions


@pytest.fixture(scope="module")
def parts():
    return questions.parts(questions.read_source())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_example_depends_on_its_index_alone(parts, split):
    for index in (0, 7):
        one, other = (questions.example(parts[split], index) for _ in range(2))
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert any(
        (
            questions.example(parts[split], 0)[0]
            != questions.example(parts[split], 1)[0]
        ).ravel()
    )


def test_every_answer_is_asked_for_and_none_is_rare(parts):
    answers, asked = {}, {}
    for index in range(3000):
        _, question, answer = questions.example(parts["train"], index)
        answers.setdefault(question, []).append(answer)
        asked[question] = asked.get(question, 0) + 1
    assert len(asked) == 4
    assert min(asked.values()) > 650
    for counts in answers.values():
        for words in zip(*map(str.split, counts), strict=True):
            shares = [words.count(word) / len(words) for word in set(words)]
            assert len(shares) in (2, 6, 10)
            assert max(shares) < 1.4 / len(shares)
    texts = [*asked, *(answer for counts in answers.values() for answer in counts)]
    words = {word for text in texts for word in text.split()}
    assert words == set(questions.vocabulary())


def test_no_digit_and_no_pixel_is_in_both_parts():
    """Every row of the photographs, halved, holds its own number."""
    rows = np.repeat(np.arange(213, dtype=np.uint8), 2)[:, None, None]
    photograph = np.broadcast_to(rows, (426, 640, 3))
    numbers = np.arange(1797)
    source = questions.Source(
        numbers[:, None, None], numbers, [[photograph], [photograph]]
    )
    parts = questions.parts(source)
    train, held_out = parts["train"], parts["validation"]
    assert sorted([*train.labels, *held_out.labels]) == numbers.tolist()
    for bands, others in zip(train.photographs, held_out.photographs, strict=True):
        trained, unseen = (
            {*np.concatenate(b).ravel().tolist()} for b in (bands, others)
        )
        assert not trained & unseen
        assert {*range(210)} == trained | unseen
        # Held-out bands lie between those to train on: the same kind of picture.
        assert min(trained) < min(unseen)
        assert max(unseen) < max(trained)


@pytest.mark.parametrize(("split", "alike"), [("train", False), ("validation", True)])
def test_only_digits_to_train_on_are_distorted(parts, monkeypatch, split, alike):
    """One digit, white on black, at places of its own."""
    monkeypatch.setattr(questions, "COLOURS", {"white": (255, 255, 255)})
    dark = [[np.zeros((30, 60, 3), np.uint8)]] * 2
    source = parts[split]._replace(photographs=dark)
    source = source._replace(digits=source.digits[:1], labels=source.labels[:1])
    drawn = []
    for index in range(6):
        ink = questions.example(source, index)[0][:, :28, 0]
        down, across = np.nonzero(ink)
        box = (slice(down.min(), down.max() + 1), slice(across.min(), across.max() + 1))
        drawn.append(ink[box].tobytes())
    assert len({*drawn}) == (1 if alike else 6)


def test_a_distortion_maps_the_axes_about_the_centre(parts):
    """By a quarter turn, which NumPy does too; by none, the enlarged digit."""
    digit = parts["train"].digits[3]
    plain = questions._stroke(digit, [0, 0, 0, 0])
    turned = questions._stroke(digit, [-100, 100, -100, -100])
    np.testing.assert_allclose(turned, np.rot90(plain, -1), atol=1e-5)
    small = plain.reshape(8, 3, 8, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), digit.ravel())[0, 1] > 0.97


def _ink(picture, side):
    """The colour of the brightest pixel of a half, where the ink is full."""
    half = picture[:, :28] if side == "left" else picture[:, 28:]
    flat = half.reshape(-1, 3).astype(int)
    return flat[flat.max(1).argmax()]


def test_the_answer_about_a_colour_is_the_colour_that_was_drawn(parts):
    pictures = 0
    for index in range(200):
        picture, question, answer = questions.example(parts["train"], index)
        side = question.split()[-2]
        if side not in ("left", "right"):
            continue
        pictures += 1
        ink = _ink(picture, side)
        nearest = min(
            questions.COLOURS,
            key=lambda name: np.abs(ink - questions.COLOURS[name]).sum(),
        )
        assert nearest == answer.split()[0]
    assert pictures > 50


def test_other_sources_are_refused(monkeypatch):
    monkeypatch.setattr(questions, "CHECKSUM", "0" * 64)
    with pytest.raises(ValueError, match="another release of scikit-learn"):
        questions.read_source()


def test_the_data_set_is_read_as_it_was_made(tmp_path, monkeypatch, parts):
    from experiments.datasets.tfds_reader import examples

    monkeypatch.setattr(questions, "SIZES", {"train": 6, "validation": 3})
    for split, count in questions.SIZES.items():
        records = examples("picture_questions", split, tmp_path)
        assert len(records) == count
        for index, example in enumerate(records):
            picture, question, answer = questions.example(parts[split], index)
            np.testing.assert_array_equal(example["picture"], picture)
            assert example["question"].decode() == question
            assert example["answer"].decode() == answer
