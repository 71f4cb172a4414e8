"""Mutated inputs of the command end in a clear sentence or in the right result.

JAXPRUNE_FUZZ says how many inputs there are, JAXPRUNE_SEED where they begin. By hand:
`JAXPRUNE_FUZZ=1000 python -m pytest -n0 -s -m full tests/lm/cli/test_fuzz.py`.
"""

import collections
import os

import pytest

from tests.support import fuzz

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

INPUTS = int(os.environ.get("JAXPRUNE_FUZZ", "120"))
FIRST = int(os.environ.get("JAXPRUNE_SEED", "0"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # NumPy's, of numbers that overflow
def test_every_mutated_input_is_refused_in_a_sentence_or_right(tmp_path):
    fuzzer = fuzz.Fuzzer(tmp_path)
    found, bad = collections.Counter(), []
    for seed in range(FIRST, FIRST + INPUTS):
        kind, words, said = fuzzer.case(seed)
        found[kind] += 1
        if kind not in ("refused", "right"):
            bad.append(f"seed {seed}: {kind}: {' '.join(map(str, words))}\n  {said}")
            print(bad[-1][:600], flush=True)
    print(dict(found))
    assert not bad, "\n".join(bad)
    assert min(found["refused"], found["right"]) > INPUTS / 10
