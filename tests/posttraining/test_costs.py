"""What pruning costs: one program for equal layers, one layer's statistics in memory.

And what it is worth: the better the method, the smaller the error of the outputs.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.compilations import compiled
from tests.support.small_models import (
    chain,
    chain_by_hand,
    correlated,
    draw,
    kernels_of,
    prune,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation


def run_stack(p, x):
    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, p)[0]


def stack(layers):
    """Parameters of equal layers, stacked."""
    return {"up": draw(0, layers, 5, 5), "down": draw(1, layers, 5, 5)}


MODELS = {
    "one by one": (run_chain, lambda layers: chain([5] * (layers + 1))),
    "stacked": (run_stack, stack),
}
X = [correlated(i, 12, 5) for i in range(2)]


@pytest.mark.full
@pytest.mark.parametrize("model", ["one by one", "stacked"])
def test_equal_layers_share_their_programs(model):
    fn, make = MODELS[model]
    numbers, counts = [], []
    for layers in (3, 4):
        params = jax.tree.map(jnp.asarray, make(layers))
        prune(fn, params, X, "wanda")  # what is compiled once for a shape is done now
        with compiled() as events:
            numbers.append(prune(fn, params, X, "wanda").report["programs"])
            counts.append(len(events))
    assert numbers[0] == numbers[1] > 0
    # Nor is anything else compiled layer by layer.
    assert counts[0] == counts[1] <= 2 * numbers[0] + 2


def run_windows(windows):
    """Layers that mix positions within a window and turn by angles of their own."""

    def run(p, x, note=lambda name, inputs: None):
        place = jnp.arange(len(x))
        for i, (own, window) in enumerate(zip(p, windows, strict=True)):
            turn = jnp.cos(place / jnp.float32(10 * window))[:, None]
            near = jnp.abs(place[:, None] - place[None]) < window
            note(f"{i}/mix", x)
            h = turn * (x @ own["mix"])
            h = jax.nn.softmax(jnp.where(near, h @ x.T, -jnp.inf)) @ h
            note(f"{i}/out", h)
            x = x + h @ own["out"]
        return x

    return run


WINDOWS = [2, 5, 3, 2]
WINDOWED = [{"mix": draw(2 * i, 5, 5), "out": draw(2 * i + 1, 5, 5)} for i in range(4)]


@pytest.mark.full
def test_layers_that_differ_in_their_tables_share_their_programs():
    different, alike = (
        prune(run_windows(windows), WINDOWED, X, "wanda").report["programs"]
        for windows in (WINDOWS, [2, 2, 2, 2])
    )
    assert different == alike <= 4  # two of the first layer, two of the others


def test_layers_that_differ_in_their_tables_have_their_own():
    fn = run_windows(WINDOWS)
    moments = jp.calibrate(fn, WINDOWED, X)

    @jax.jit
    def inputs_of(x):
        seen = {}
        fn(WINDOWED, x, seen.__setitem__)
        return seen

    seen = jax.device_get([inputs_of(x) for x in X])
    for name in moments:
        expected = np.square(np.concatenate([own[name] for own in seen])).mean(0)
        np.testing.assert_allclose(moments[name].mean_square[0], expected, rtol=1e-4)


def test_more_batches_compile_nothing_more():
    params = chain([5] * 4)
    prune(run_chain, params, X, "wanda")
    numbers = []
    for count in (1, 2):
        with compiled() as events:
            prune(run_chain, params, X * count, "wanda")
            numbers.append(len(events))
    assert numbers[0] == numbers[1]


# Memory.

WIDTHS = [11, 13, 17]  # sizes that no other live array has
SAMPLES = 23
IN_MEMORY = []


def _look():
    IN_MEMORY.append([array.shape for array in jax.live_arrays()])


@dataclasses.dataclass(frozen=True)
class Watching(jp.passes.Prune):
    """Magnitude pruning that asks for Hessians and looks at what is in memory."""

    observes: ClassVar = frozenset({"hessian"})

    def solve(self, matrix):
        assert matrix.hessian.shape == (matrix.weight.shape[0],) * 2
        jax.debug.callback(_look)
        return jp.passes.magnitude().solve(matrix)


@pytest.mark.full
def test_one_layers_statistics_and_activations_are_in_memory():
    IN_MEMORY.clear()
    batches = [correlated(i, SAMPLES, WIDTHS[0]) for i in range(3)]
    prune(run_chain, chain(WIDTHS), batches, Watching())
    jax.effects_barrier()
    assert len(IN_MEMORY) == len(WIDTHS) - 1
    for width, shapes in zip(WIDTHS, IN_MEMORY, strict=False):
        hessians = [s for s in shapes if len(s) == 3 and s[1] == s[2] in WIDTHS]
        assert hessians == [(1, width, width)]
        squares = [s for s in shapes if s in [(1, w) for w in WIDTHS]]
        assert squares == [(1, width)]
        # Of each batch the input; the batches themselves are NumPy here.
        values = [s for s in shapes if len(s) == 2 and s[0] == SAMPLES]
        assert set(values) <= {(SAMPLES, width)}
        assert len(values) <= len(batches)


# Worth.


@pytest.mark.full  # four methods to compile
def test_better_methods_leave_smaller_errors():
    params = chain([16, 16, 16])
    batches = [correlated(i, 64, 16) / 4 for i in range(2)]
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt", "alps"):
        pruned, report = prune(run_chain, params, batches, method, 0.6)
        after = kernels_of(pruned)
        inputs, before = chain_by_hand(
            params, batches, lambda i, kernel, x, after=after: after[i]
        )
        lost = [
            np.square(x @ (np.asarray(old, np.float64) - new)).sum()
            / np.square(x @ old).sum()
            for x, old, new in zip(inputs, kernels_of(params), before, strict=True)
        ]
        errors[method] = np.mean(lost)
        # The report's are those of the first of the two batches.
        reported = np.mean([row["error"] for row in report["weights"]])
        assert 0.5 < reported / errors[method] < 2
    assert errors["alps"] <= errors["sparsegpt"]
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
