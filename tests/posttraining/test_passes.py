"""Passes that chain: the short form and the long one, what composes, and one's own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining.passes.chaining import as_chain
from tests.support.small_models import chain as kernels
from tests.support.small_models import correlated, run_chain
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

PARAMS = kernels([8, 8, 8])
BATCHES = [correlated(i, 40, 8) for i in range(3)]
alps, correct, wanda = jp.passes.alps, jp.passes.correct, jp.passes.wanda
chain, quantize = jp.passes.chain, jp.passes.quantize


def prune(method, sparsity=None, **options):
    return jp.prune_trained(run_chain, PARAMS, BATCHES, method, sparsity, **options)


def test_a_sparsity_replaces_that_of_the_pass_that_chooses():
    passes = chain(wanda(0.5), correct(0.25), quantize("int8"))
    assert as_chain(passes) == passes
    assert as_chain(passes, 0.75) == chain(wanda(0.75), correct(0.25), quantize("int8"))
    assert as_chain("alps", 0.5) == chain(alps(0.5))


def test_chains_in_a_chain_are_their_passes():
    inner = chain(wanda(0.5), correct(0.5))
    assert chain(inner, quantize()) == chain(wanda(0.5), correct(0.5), quantize())


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([], "needs one pass that chooses which weights are kept, got none; begin"),
        ([quantize()], "chooses which weights are kept, got Quantize"),
        ([wanda(), alps()], "chooses which weights are kept, got Wanda, ALPS"),
        ([wanda(), quantize(), quantize()], "each kind of pass once.* one Quantize"),
        ([wanda(), correct(), correct(0.1)], "each kind of pass once.* one Correct"),
        ([quantize(), wanda()], "prunes, then quantizes, got Quantize, Wanda; put"),
        ([wanda(inputs="dense"), correct()], 'correct goes by .* but inputs="dense"'),
    ],
)
def test_what_does_not_compose_is_refused_where_it_is_chained(passes, words):
    with pytest.raises(ValueError, match=words) as raised:
        chain(*passes)
    assert not str(raised.value).endswith(".")


def test_what_composes():
    for passes in (
        [correct(), wanda()],
        [wanda(inputs="dense"), correct(0.0)],
        [wanda(), quantize()],
        [alps(), correct(), quantize()],
    ):
        assert chain(*passes).passes == tuple(passes)


def test_a_chain_takes_passes():
    with pytest.raises(TypeError, match=r"takes passes, got \['wanda'\]; write"):
        chain("wanda")


def test_a_chain_observes_what_its_passes_do():
    assert chain(jp.passes.magnitude()).observes == frozenset()
    assert chain(wanda()).observes == {"squares"}
    assert chain(wanda(), correct(0.0)).observes == {"squares"}
    assert chain(wanda(), correct()).observes == {"squares", "hessian", "drift"}
    assert chain(alps(), quantize()).observes == {"hessian"}


@dataclasses.dataclass(frozen=True)
class InputPower(jp.passes.Prune):
    """Keeps the largest |w| * norm(x) ** power."""

    power: float = 1.0
    observes = frozenset({"squares"})

    def solve(self, matrix):
        norms = jnp.sqrt(matrix.mean_square)[:, None]
        return matrix.keep_highest(jnp.abs(matrix.weight) * norms**self.power)


@dataclasses.dataclass(frozen=True)
class Halve(jp.passes.Pass):
    """Half of each kept weight, which no solver would do."""

    def settle(self, matrix, solution, damping):
        return solution._replace(weight=solution.weight / 2)


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["per-output", "2:4"])
def test_a_pass_of_ones_own_prunes_by_its_formula(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    found = prune(InputPower(sparsity, pattern=pattern))
    expected = prune(wanda(sparsity, pattern=pattern))
    assert same_bits(found.params, expected.params)
    assert found.report["method"] == "InputPower(power=1.0)"


@pytest.mark.full
def test_a_pass_of_ones_own_may_change_what_is_kept():
    found = prune(chain(jp.passes.magnitude(0.5), Halve()))
    expected = prune(jp.passes.magnitude(0.5))
    for name, layer in found.params.items():
        half = np.asarray(expected.params[name]["kernel"]) / 2
        np.testing.assert_array_equal(layer["kernel"], half)
    assert found.report["other_passes"] == ["Halve()"]


def test_a_pass_without_a_solver_says_so():
    with pytest.raises(NotImplementedError, match=r"Prune needs a method solve"):
        prune(jp.passes.Prune(0.5))


@pytest.mark.full
def test_any_method_may_make_up_for_what_was_lost():
    params = kernels([8, 16, 16, 16, 8])
    batches = [correlated(i, 200, 8) for i in range(2)]

    def lost(*passes):
        pruned = jp.prune_trained(
            run_chain, params, batches, chain(wanda(0.5), *passes)
        )
        return pruned.report["weights"][-1]["error"]

    def end(params):
        return np.concatenate([run_chain(params, x) for x in batches])

    plain = jp.prune_trained(run_chain, params, batches, wanda(0.5))
    whole = end(params)
    before = np.square(end(plain.params) - whole).sum() / np.square(whole).sum()
    assert lost(correct(0.5)) < before
