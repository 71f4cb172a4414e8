"""Which method the options of `jaxprune prune` stand for."""

import pytest

import jaxprune as jp
from jaxprune.lm.jobs.passes import choose_method
from tests.support.chained import chained


def test_a_correction_is_for_solvers_alone():
    alps = choose_method("alps", relative=False, correction=0.25)
    assert alps == chained("alps", correct=jp.passes.correct(0.25))
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        choose_method("alps", correction=2.0)


def test_tokens_of_one_size_and_half_a_correction_are_the_default():
    half, relative = jp.passes.correct(0.5), {"relative": True}
    solver = jp.passes.sparsegpt(**relative)
    assert choose_method("sparsegpt") == chained(solver, correct=half)
    assert choose_method("alps") == chained(jp.passes.alps(**relative), correct=half)
    assert choose_method("wanda") == chained(jp.passes.wanda(**relative))
    assert choose_method("ria") == chained(jp.passes.ria(**relative))
    assert choose_method("magnitude") == chained("magnitude")
    papers = chained(jp.passes.sparsegpt(inputs="dense"))
    assert choose_method("sparsegpt", inputs="dense", relative=False) == papers
    plain = choose_method("sparsegpt", relative=False, correction=0.0)
    assert plain == chained("sparsegpt")
