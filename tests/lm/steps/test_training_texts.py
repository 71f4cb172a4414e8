"""What a recovery is trained on: as many sequences of each text."""

import collections

import numpy as np
import pytest

pytest.importorskip("tyro")

from pathlib import Path

from jaxprune.lm.steps.recovery_settings import Recovery

from jaxprune.lm.corpora import text_files
from jaxprune.lm.steps import inputs
from jaxprune.lm.steps.settings import Calibration


def rows(first, count):
    """A text of token ids, each of which is in one sequence."""
    tokens = np.arange(first, first + 8 * count, dtype=np.int32).reshape(count, 8)
    return text_files.Text(Path(f"{first}.npy"), str(first), tokens)


def drawn(steps, *texts, batch=None):
    recovery = Recovery(recover_steps=steps, recover_batch=batch)
    return inputs.draw_training(
        recovery, Calibration(length=8, batch=2), list(texts), None
    )


def test_a_short_text_gives_its_sequences_again():
    tokens = drawn(12, rows(0, 50), rows(1000, 3))
    assert tokens.shape == (24, 8)
    counts = collections.Counter(int(row[0]) for row in tokens)
    long = [n for first, n in counts.items() if first < 1000]
    assert long == [1] * 12
    assert sorted(n for first, n in counts.items() if first >= 1000) == [4, 4, 4]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_all_texts_have_is_drawn_as_from_one_mixture(steps):
    texts = rows(0, 8), rows(1000, 8)
    mixture = text_files.draw_sequences(
        texts, sequences=2 * steps, length=8, bos=None, seed=1
    )
    np.testing.assert_array_equal(drawn(steps, *texts), mixture.tokens)


def test_steps_of_a_batch_of_their_own_need_other_numbers():
    assert len(drawn(12, rows(0, 50), batch=1)) == 12


@pytest.mark.parametrize("texts", [[rows(0, 3)], [rows(0, 3), rows(1000, 3)]])
def test_texts_of_one_length_are_drawn_once(texts):
    tokens = drawn(100, *texts)
    assert len(tokens) == len(np.unique(tokens[:, 0])) == 3 * len(texts)


def test_only_the_rows_that_measure_are_not_trained_on():
    text = rows(0, 20)
    calibrated = text_files.draw_sequences(
        [text], sequences=2, length=8, bos=None, seed=0, most=3
    )
    (measured,) = calibrated.undrawn
    (left,) = inputs.without_rows([text], [text], [measured])
    firsts = set(left.tokens[:, 0].tolist())
    assert firsts == set(range(0, 160, 8)) - set(measured.tokens[:, 0].tolist())
    assert len(firsts) == 17
    assert inputs.without_rows([text], [text], ()) == [text]
