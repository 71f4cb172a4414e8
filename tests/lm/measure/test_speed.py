import itertools
import types

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
    assert found == {"only": {"prefill": 12 / 2, "decode": 8 / 4}}
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
