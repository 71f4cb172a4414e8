"""Which method the options of `jaxprune prune` stand for."""

import pytest

import jaxprune as jp
from jaxprune.lm.cli import parse
from tests.support.chained import chained


def test_a_correction_is_for_solvers_alone():
    found = parse.method("alps", None, "left", relative=False, correction=0.25)
    assert found == chained("alps", correct=jp.passes.correct(0.25))
    with pytest.raises(ValueError, match="--correction is for sparsegpt and alps"):
        parse.method("wanda", None, "left", correction=0.5)
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        parse.method("alps", None, "left", correction=2.0)
    with pytest.raises(ValueError, match="without --inputs dense"):
        parse.method("alps", None, "dense", correction=0.5)


def test_tokens_of_one_size_and_half_a_correction_are_the_default():
    def made(name, inputs="left", **settings):
        return parse.method(name, None, inputs, **settings)

    half, relative = jp.passes.correct(0.5), {"relative": True}
    assert made("sparsegpt") == chained(jp.passes.sparsegpt(**relative), correct=half)
    assert made("alps") == chained(jp.passes.alps(**relative), correct=half)
    assert made("wanda") == chained(jp.passes.wanda(**relative))
    assert made("ria") == chained(jp.passes.ria(**relative))
    assert made("magnitude") == chained("magnitude")
    papers = chained(jp.passes.sparsegpt(inputs="dense"))
    assert made("sparsegpt", "dense", relative=False) == papers
    plain = made("sparsegpt", relative=False, correction=0.0)
    assert plain == chained("sparsegpt")
