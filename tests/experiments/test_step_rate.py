"""The rate of a training counts neither the step that compiles nor its tokens."""

import jax.numpy as jnp
import pytest

from experiments.harness import progress


@pytest.mark.parametrize("window", [1, 4])
def test_the_step_that_compiles_is_in_no_rate(monkeypatch, window):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    written = []
    shown = progress.Progress("run", written.append, start=0, steps=12)
    with shown:
        for step in range(12):
            now[0] += 100 if step == 0 else 2
            shown.add(jnp.float32(1), 100)
            if (step + 1) % window == 0:
                shown.close(step + 1)
        shown.finish()
    rates = [metrics["tokens_per_second"] for metrics in written]
    assert len(rates) == 12 // window
    # Each step is 100 tokens in two seconds; what is done when a rate is asked for
    # may be a step behind the clock.
    assert all(rate is None or 30 <= rate <= 50 for rate in rates), rates
    assert rates[-1] == pytest.approx(50)
