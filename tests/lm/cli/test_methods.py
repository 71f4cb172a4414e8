"""Which method the options of `jaxprune prune` stand for."""

import pytest

import jaxprune as jp
from jaxprune.lm.cli import parse


def test_a_correction_is_for_solvers_alone():
    found = parse.method("alps", None, "left", relative=False, correction=0.25)
    assert found == jp.methods.ALPS(correction=0.25)
    with pytest.raises(ValueError, match="--correction is for sparsegpt and alps"):
        parse.method("wanda", None, "left", correction=0.5)
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        parse.method("alps", None, "left", correction=2.0)
    with pytest.raises(ValueError, match="without --inputs dense"):
        parse.method("alps", None, "dense", correction=0.5)


def test_tokens_of_one_size_and_half_a_correction_are_the_default():
    def made(name, inputs="left", **settings):
        return parse.method(name, None, inputs, **settings)

    best = {"relative": True, "correction": 0.5}
    assert made("sparsegpt") == jp.methods.SparseGPT(**best)
    assert made("alps") == jp.methods.ALPS(**best)
    assert made("wanda") == jp.methods.Wanda(relative=True)
    assert made("ria") == jp.methods.RIA(relative=True)
    assert made("magnitude") == jp.methods.Magnitude()
    papers = jp.methods.SparseGPT(inputs="dense")
    assert made("sparsegpt", "dense", relative=False) == papers
    plain = made("sparsegpt", relative=False, correction=0.0)
    assert plain == jp.methods.SparseGPT()
