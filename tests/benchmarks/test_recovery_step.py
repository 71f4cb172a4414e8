"""The ways of a recovery's step are one gradient, but for what they leave out."""

import json

import numpy as np
import pytest

pytest.importorskip("tyro")

from benchmarks import recovery_step
from tests.support import tiny_hf

_VOCABULARY = 16384  # 4,096 of the others and what is named are less than half


@pytest.mark.full
def test_all_ways_are_timed_and_compared_with_the_first(tmp_path, capsys):
    config = tiny_hf.config_json("llama", vocab_size=_VOCABULARY)
    for seed, name in enumerate(("dense", "pruned")):  # unlike, or nothing is learned
        weights = tiny_hf.random_tensors("llama", seed, vocab_size=_VOCABULARY)
        tiny_hf.save(tmp_path / name, config, weights)
    np.save(tmp_path / "rows.npy", tiny_hf.tokens(4, 16))
    paths = [tmp_path / name for name in ("dense", "pruned", "rows.npy")]
    recovery_step.main(recovery_step.Config(*paths, length=16, rounds=1))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*report["ways"]] == [*recovery_step.WAYS]
    cosine = {name: way["cosine"] for name, way in report["ways"].items()}
    exact, *others = cosine.values()
    assert exact == pytest.approx(1, abs=1e-6)
    assert cosine["float32, all logits"] == pytest.approx(1, abs=1e-6)
    # Sampled logits and bfloat16 are other numbers, near the same direction.
    assert all(0.9 < value < 1 - 1e-7 for value in others[1:])
