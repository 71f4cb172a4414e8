"""Which method the options of `jaxprune prune` stand for."""

import jaxprune as jp
from jaxprune.lm.steps.passes import choose_method
from tests.support.chained import chained


def test_tokens_of_one_size_and_half_a_correction_are_the_default():
    half, relative = jp.passes.correct(0.5), {"relative": True}
    solver = jp.passes.sparsegpt(**relative)
    assert choose_method("sparsegpt") == chained(solver, correct=half)
    assert choose_method("alps") == chained(jp.passes.alps(**relative), correct=half)
    assert choose_method("wanda") == chained(jp.passes.wanda(**relative))
    assert choose_method("ria") == chained(jp.passes.ria(**relative))
    assert choose_method("magnitude") == chained("magnitude")
    assert choose_method("sparsegpt", correction=0.0) == chained(solver)
