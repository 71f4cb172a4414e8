import itertools
import statistics
import types

import numpy as np
import pytest

from jaxprune.lm.measure import speed
from jaxprune.lm.models.decoder.config import DecoderConfig
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=17, context=16, layers=1, width=8, heads=2, kv_heads=1, head_dim=4,
    mlp_width=8,
)  # fmt: skip


def test_tokens_are_divided_by_the_median_of_the_seconds(monkeypatch):
    # The three readings of a timing are 1 and 2 s apart, the next timing's 4 and 8 s.
    passing = itertools.cycle([0, 1, 2, 0, 4, 8, 0, 2, 4])
    now = itertools.accumulate(passing)
    clock = types.SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr(speed, "time", clock)
    model, ticks = initial(CONFIG), []
    found = speed.measure_speed(
        {"only": model}, prompt=6, steps=4, batch=2, rounds=3,
        progress=ticks.append,
    )  # fmt: skip
    # The first timing is of the compilation; then 4, 2 and 1 s, and twice that.
    rounds = {"prefill": [12 / 4, 12 / 2, 12 / 1], "decode": [8 / 8, 8 / 4, 8 / 2]}
    medians = {"prefill": 12 / 2, "decode": 8 / 4}
    assert found["only"].keys() == {*medians, "rounds"}
    assert {phase: found["only"][phase] for phase in medians} == medians
    assert {k: sorted(v) for k, v in found["only"]["rounds"].items()} == rounds
    assert len(ticks) == 3


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"prompt": 0, "steps": 1}, "must be at least 1, got 0, 1"),
        ({"prompt": 12, "steps": 5}, "the context of 'only', got 16"),
    ],
)
def test_what_cannot_be_timed_is_refused(numbers, told):
    with pytest.raises(ValueError, match=told):
        speed.measure_speed({"only": initial(CONFIG)}, **numbers)


def rates(decode):
    """The speed of a model whose rounds decoded at these rates."""
    rounds = {"prefill": [1.0] * len(decode), "decode": decode}
    return {"prefill": 1.0, "decode": statistics.median(decode), "rounds": rounds}


@pytest.mark.parametrize(
    ("before", "again", "after", "distinguishable"),
    [
        ([10, 10, 10], [10, 11, 9], [13, 13, 13], True),
        ([10, 10, 10], [10, 10, 7], [13, 13, 13], False),  # 10/7 of itself
        ([10, 10, 10], [10, 13.5, 10], [13, 13, 13], False),
        ([10, 10, 10], [10, 10, 11], [8, 8, 8], True),  # slower
        ([10, 10], [10, 10], [20, 20], False),  # too few
        ([10, 20, 10], [10, 20, 10], [15, 30, 15], True),  # a drift hits both
    ],
)
def test_a_factor_says_something_outside_of_what_a_model_differs_from_itself(
    before, again, after, distinguishable
):
    timed = rates(before), rates(again), rates(after)
    found = speed.compare_speed(*timed)["decode"]
    assert found["distinguishable"] == distinguishable
    by_round = np.divide(after, before)
    assert (found["low"], found["high"]) == (by_round.min(), by_round.max())
    assert found["ratio"] == np.median(after) / np.median(before)
