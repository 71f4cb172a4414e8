"""Batches are functions of (seed, step); validation counts every token once."""

import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.datasets import Batches, prefetch, validation_batches

# Training batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 65, 1000)
    batches = Batches(tokens, 4, 16, seed=7)
    in_order = [batches(step) for step in range(5)]
    fresh = Batches(tokens.copy(), 4, 16, seed=7)
    for step in (3, 0, 4):
        for ours, expected in zip(fresh(step), in_order[step], strict=True):
            np.testing.assert_array_equal(ours, expected)
    firsts = [batches(step)[0].tobytes() for step in range(50)]
    others = [Batches(tokens, 4, 16, seed=8)(step)[0].tobytes() for step in range(50)]
    assert len({*firsts, *others}) == 100


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = Batches(np.arange(500, dtype=np.uint16), 12, 64, seed=1)(9)
    assert inputs.shape == targets.shape == (12, 64)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(64))


def test_offsets_are_uniform_over_all_windows():
    length, context = 20, 8  # offsets 0 to 11, as nanoGPT's randint(length - context)
    batches = Batches(np.arange(length), 1000, context, seed=0)
    offsets = np.concatenate([batches(step)[0][:, 0] for step in range(12)])
    counts = np.bincount(offsets, minlength=12)
    assert len(counts) == length - context
    # Chi-squared with 11 degrees of freedom: above 40 in 1 of 30,000 seeds.
    assert ((counts - 1000) ** 2 / 1000).sum() < 40


def test_the_words_are_philox_of_seed_and_step():
    # Salmon et al. 2011, philox4x64-10, in Python integers.
    def philox(counter, key):
        for _ in range(10):
            a, b = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
            counter = (
                (b >> 64) ^ counter[1] ^ key[0],
                b % 2**64,
                (a >> 64) ^ counter[3] ^ key[1],
                a % 2**64,
            )
            key = (
                (key[0] + 0x9E3779B97F4A7C15) % 2**64,
                (key[1] + 0xBB67AE8584CAA73B) % 2**64,
            )
        return counter

    seed, step, tokens = 3, 2**40 + 1, np.arange(5000)
    words = philox((1, 0, 0, 0), (seed, step))  # NumPy counts from 1
    inputs, _ = Batches(tokens, 4, 10, seed)(step)
    assert inputs[:, 0].tolist() == [word % 4990 for word in words]


def test_a_text_too_short_for_a_batch_is_refused():
    message = re.escape("at least context + 1 = 65 tokens, got 64; give a longer text")
    with pytest.raises(ValueError, match=message):
        Batches(np.zeros(64, np.int32), 12, 64, seed=0)


# Prefetching


def prefetching_threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 4), (2, 9), (5, 4)])
@pytest.mark.parametrize("ahead", [1, 2, 20])
def test_prefetch_gives_every_step_once_in_order(start, stop, ahead):
    steps = list(prefetch(lambda step: step, start, stop, ahead=ahead))
    assert steps == list(range(start, stop))
    assert not prefetching_threads()


def test_the_next_batches_are_made_while_one_is_in_use():
    made = {step: threading.Event() for step in range(10)}
    batches = prefetch(lambda step: made[step].set() or step, 0, 10, ahead=2)
    assert next(batches) == 0
    assert made[1].wait(10)
    assert made[2].wait(10)
    time.sleep(0.05)
    assert not made[3].is_set()
    batches.close()


def test_an_error_is_raised_at_its_step():
    def make(step):
        if step == 3:
            raise ZeroDivisionError("step 3")
        return step

    batches = prefetch(make, 0, 10)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="step 3"):
        next(batches)
    assert list(batches) == []
    assert not prefetching_threads()


def test_stopping_early_ends_the_thread():
    made = []
    for step in prefetch(lambda step: made.append(step) or step, 0, 1000):
        if step == 2:
            break
    del step
    deadline = time.monotonic() + 10
    while prefetching_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetching_threads()
    assert len(made) <= 5


# Validation batches


@given(
    length=st.integers(2, 200),
    batch_size=st.integers(1, 5),
    context=st.integers(1, 20),
    limit=st.none() | st.integers(1, 250),
)
@settings(max_examples=100, deadline=None)
def test_every_target_counts_exactly_once(length, batch_size, context, limit):
    tokens = np.arange(length, dtype=np.uint16)
    batches = validation_batches(tokens, batch_size, context, limit)
    for inputs, targets, weights in batches:
        assert inputs.shape == targets.shape == weights.shape == (batch_size, context)
        assert (inputs.dtype, targets.dtype, weights.dtype) == (
            np.int32,
            np.int32,
            np.float32,
        )
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert weights.any()
    inputs, targets, weights = (
        np.concatenate(part) for part in zip(*batches, strict=True)
    )
    expected = range(1, 1 + min(length - 1, limit or length))
    assert targets[weights == 1].tolist() == list(expected)
    np.testing.assert_array_equal(inputs[weights == 1] + 1, targets[weights == 1])
    # Each window starts where the one before ended.
    used = weights[:, 0] == 1
    assert inputs[used, 0].tolist() == list(range(0, len(expected), context))


def test_the_weighted_mean_is_the_mean_over_all_targets():
    tokens = np.random.default_rng(0).integers(0, 65, 1001)
    table = np.random.default_rng(1).random((65, 65))  # a loss for each pair
    batches = validation_batches(tokens, 4, 32)
    total = sum((table[i, t] * w).sum() for i, t, w in batches)
    count = sum(w.sum() for _, _, w in batches)
    assert count == 1000
    np.testing.assert_allclose(
        total / count, table[tokens[:-1], tokens[1:]].mean(), rtol=1e-12
    )


def test_a_limit_is_a_fixed_prefix():
    tokens = np.arange(1000)
    whole = validation_batches(tokens, 2, 8)
    part = validation_batches(tokens, 2, 8, limit=40)
    assert len(part) == 3
    for ours, expected in zip(part[:2], whole, strict=False):
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_validation_set_too_short_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1; give a longer"):
        validation_batches(np.zeros(1, np.int32), 1, 1)
