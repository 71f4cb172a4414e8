"""Which method the options of `jaxprune prune` stand for."""

import pytest

import jaxprune as jp
from jaxprune.lm.jobs.passes import choose_method


def test_a_correction_is_for_solvers_alone():
    alps = choose_method("alps", relative=False, correction=0.25)
    assert alps == jp.methods.ALPS(correction=0.25)
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        choose_method("alps", correction=2.0)


def test_tokens_of_one_size_and_half_a_correction_are_the_default():
    best = {"relative": True, "correction": 0.5}
    assert choose_method("sparsegpt") == jp.methods.SparseGPT(**best)
    assert choose_method("alps") == jp.methods.ALPS(**best)
    assert choose_method("wanda") == jp.methods.Wanda(relative=True)
    assert choose_method("ria") == jp.methods.RIA(relative=True)
    assert choose_method("magnitude") == jp.methods.Magnitude()
    papers = jp.methods.SparseGPT(inputs="dense")
    assert choose_method("sparsegpt", inputs="dense", relative=False) == papers
    plain = choose_method("sparsegpt", relative=False, correction=0.0)
    assert plain == jp.methods.SparseGPT()
