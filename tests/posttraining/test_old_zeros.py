"""What was zero before stays so where an allocation asks for fewer zeros."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.small_models import draw, prune
from tests.support.small_models import quick_compilation as quick_compilation

P = jp.passes
BATCHES = [draw(i, 48, 16) for i in range(2, 6)]


def run(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def sparse():
    """Three quarters of each matrix are zero."""
    params = {"up": draw(0, 16, 32), "down": draw(1, 32, 8)}
    masks = jp.masks.make(jp.scores.magnitude(params), 0.75, allocation="layer")
    return jp.masks.apply(params, masks)


def zeros_of(params):
    return {name: np.asarray(leaf) == 0 for name, leaf in params.items()}


@pytest.mark.parametrize(
    "passes",
    [
        P.chain(P.sparsegpt({"up": 0.8}), P.correct(0.5)),
        pytest.param(
            P.chain(P.wanda({"up": 0.8}), P.correct(0.5)), marks=pytest.mark.full
        ),
        pytest.param(
            P.chain(P.alps({"up": 0.8}), P.correct(0.5)), marks=pytest.mark.full
        ),
        pytest.param(
            P.chain(P.sparsegpt({"up": 0.8}), P.quantize("int8", group=16)),
            marks=pytest.mark.full,
        ),
    ],
    ids=["sparsegpt", "wanda", "alps", "quantized"],
)
def test_a_matrix_that_is_left_alone_keeps_its_zeros(sparse, passes):
    result = jp.prune_trained(run, sparse, BATCHES, passes)
    before, after = zeros_of(sparse), zeros_of(result.params)
    assert (after["down"] >= before["down"]).all()
    rows = {row["name"]: row for row in result.report["weights"]}
    assert rows["down"]["zeros"] == after["down"].sum()
    assert rows["down"]["removed"] == 0
    assert after["up"].sum() >= 0.8 * after["up"].size - 1


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["unstructured", "per-output"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_lower_sparsity_brings_nothing_back(sparse, method, pattern):
    result = prune(run, sparse, BATCHES, method, pattern=pattern)
    before, after = zeros_of(sparse), zeros_of(result.params)
    for name, zeros in before.items():
        assert (after[name] >= zeros).all(), name


@pytest.mark.full
def test_zeros_of_levels_are_counted():
    params = {"up": draw(0, 16, 32), "down": draw(1, 32, 8)}
    passes = P.chain(
        P.wanda(0.05),
        P.quantize("int4", group=16),
    )
    result = jp.prune_trained(run, params, BATCHES, passes)
    found = jp.sparsity(result.params).total
    assert found > 0.06  # some levels are zero
    assert result.report["achieved"] == pytest.approx(found, abs=1e-9)


def test_a_matrix_of_which_nothing_is_left_is_told():
    params = {"up": draw(0, 16, 32), "down": 1e-3 * draw(1, 32, 8)}
    passes = P.magnitude(0.5, allocation="global")
    with pytest.warns(UserWarning, match="leaves nothing of 'down'"):
        jp.prune_trained(run, params, BATCHES, passes)


class OutOfRange:
    """A rule whose shares are no shares."""

    needs_inputs = False

    def sparsities(self, weights, sparsity):
        return [-0.25, 1.25]

    def __repr__(self):
        return "OutOfRange()"


def test_shares_out_of_range_are_refused_by_name(sparse):
    passes = P.alps(0.5, allocation=OutOfRange())
    with pytest.raises(
        ValueError, match=r"OutOfRange\(\) gives .*up -0\.25.*down 1\.25"
    ):
        jp.prune_trained(run, sparse, BATCHES, passes)


def test_a_rule_behind_a_broader_one_is_refused(sparse):
    passes = P.magnitude({"*": 0.5, "down": 0.0})
    with pytest.raises(ValueError, match="'down' behind '\\*' would do nothing"):
        jp.prune_trained(run, sparse, BATCHES, passes)
    passes = P.magnitude({"down": 0.0, "*": 0.875})
    pruned = jp.prune_trained(run, sparse, BATCHES, passes).params
    assert (np.asarray(pruned["down"]) == np.asarray(sparse["down"])).all()
