"""Every public function with numbers out of range: a sentence or a result.

A row is a call that works. Each number among its arguments is then replaced by each of
`WRONG`: a number that makes no sense is refused by this package in one sentence, before
jax or numpy meets it. What is no number at all is left to them and to the type checker.
Under `jit` the same calls give what they give without.
"""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.refusals import faults

PACKAGE = Path(jp.__file__).parent
PARAMS = {
    "up": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32),
    "down": jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32),
    "bias": jnp.ones(4),
}
SCORES = jp.scores.magnitude(PARAMS)
MASKS = jp.masks.make(SCORES, 0.5)
ADAM = optax.adam(0.1)
TRACKED = optax.chain(
    jp.track_gradients(average=("square", "taylor")),
    ADAM,
    jp.track_importance(average=("weight", "magnitude")),
)
STATE = TRACKED.init(PARAMS)
GRADUAL = jp.gradual(ADAM, {1: 0.5}).init(PARAMS)


def stepped(make):
    """A transformation's first step, by the transformation's arguments."""

    def run(**arguments):
        first = [arguments.pop(k) for k in ("optimizer", "schedule") if k in arguments]
        tx = make(*first, **arguments)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    return run


MASKED = {"optimizer": ADAM, "schedule": {0: 0.5, 2: 0.6}, "criterion": "magnitude"}
CHOICE = {"allocation": "layer", "pattern": "unstructured", "axes": None}
TRACK = {"every": 1, "start": 0, "storage": "float32", "memory": "device"}
CRITERION = {"params": PARAMS, "importance": STATE, "prunable": jp.tree.prunable}
RAMP = {"final": 0.5, "begin": 0, "end": 10, "every": 5}
CALLS = {
    "masks.make": (jp.masks.make, {"scores": SCORES, "sparsity": 0.5, **CHOICE}),
    "masks.apply": (jp.masks.apply, {"params": PARAMS, "masks": MASKS}),
    "masks.pack": (jp.masks.pack, {"masks": MASKS}),
    "masks.unpack": (jp.masks.unpack, {"packed": jp.masks.pack(MASKS)}),
    "masks.get": (jp.masks.get, {"state": GRADUAL}),
    "masks.replace": (jp.masks.replace, {"state": GRADUAL, "masks": MASKS}),
    "masks.overlap": (jp.masks.overlap, {"masks": MASKS, "others": MASKS}),
    "masks.combine": (jp.masks.combine, {"first": MASKS, "second": MASKS}),
    "masks.above": (jp.masks.above, {"scores": SCORES, "threshold": 0.5}),
    "prune": (
        jp.prune,
        {"params": PARAMS, "scores": SCORES, "sparsity": 0.5, **CHOICE},
    ),
    "sparsity": (jp.sparsity, {"params": PARAMS, "masks": MASKS}),
    "get_importance": (jp.get_importance, {"state": STATE}),
    "keep_masks": (
        lambda optimizer, **rest: stepped(
            lambda: jp.keep_masks(optimizer, **rest),
        )(),
        {"optimizer": ADAM, "masks": MASKS, "packed": False},
    ),
    "gradual": (
        stepped(jp.gradual),
        MASKED | CHOICE | {"prunable": jp.tree.prunable, "grow": None, "packed": False},
    ),
    "straight_through": (
        stepped(jp.straight_through),
        MASKED | {"freeze": 3, "every": 1, "packed": False},
    ),
    "contrib.lora": (stepped(jp.contrib.lora), {"optimizer": ADAM, "rank": 2}),
    "contrib.scale_by_density": (
        stepped(jp.contrib.scale_by_density),
        {"power": 0.5, "prunable": jp.tree.prunable},
    ),
    "track_importance": (
        stepped(jp.track_importance),
        TRACK | {"weighting": jp.weightings.power(0.5), "average": "weight"},
    ),
    "track_gradients": (
        stepped(jp.track_gradients),
        TRACK | {"weighting": jp.weightings.exponential(0.9), "average": "square"},
    ),
    "tree.explain": (
        jp.tree.explain,
        {"params": PARAMS, "prunable": jp.tree.prunable},
    ),
    "tree.excluding": (lambda glob: jp.tree.excluding(glob), {"glob": "up"}),
    "Axes": (jp.Axes, {"inputs": -2, "outputs": -1}),
    "patterns.NM": (jp.patterns.NM, {"n": 2, "m": 4}),
    "patterns.Block": (jp.patterns.Block, {"rows": 2, "columns": 2}),
    "patterns.parse": (jp.patterns.parse, {"pattern": "2:4"}),
    "allocation.OWL": (jp.allocation.OWL, {"spread": 0.08, "factor": 5.0}),
    "allocation.parse": (jp.allocation.parse, {"allocation": "erk"}),
    "grow.gradient": (jp.grow.gradient, {"fraction": 0.3, "decay": "cosine"}),
    "grow.random": (jp.grow.random, {"fraction": 0.3, "decay": "cosine"}),
    "weightings.power": (jp.weightings.power, {"p": 0.5}),
    "weightings.exponential": (jp.weightings.exponential, {"decay": 0.9}),
    "schedules.once": (jp.schedules.once, {"step": 1, "final": 0.5}),
    "schedules.cubic": (jp.schedules.cubic, RAMP),
    "schedules.linear": (jp.schedules.linear, RAMP),
    "schedules.constant": (jp.schedules.constant, RAMP),
    "scores.averaged_weight": (jp.scores.averaged_weight, CRITERION),
    "scores.averaged_magnitude": (jp.scores.averaged_magnitude, CRITERION),
    "scores.magnitude": (jp.scores.magnitude, CRITERION),
    "scores.obd": (jp.scores.obd, CRITERION),
    "scores.taylor": (jp.scores.taylor, CRITERION),
    "scores.random": (jp.scores.random, CRITERION | {"seed": 0}),
    "scores.threshold": (jp.scores.threshold, CRITERION | {"compare": "weight"}),
    "scores.preconditioned_magnitude": (
        jp.scores.preconditioned_magnitude,
        CRITERION | {"exponent": 0.25},
    ),
}
WRONG = {
    "zero": 0,
    "negative": -1,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
}


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


NUMERIC = {
    name: [argument for argument, value in arguments.items() if is_number(value)]
    for name, (_, arguments) in CALLS.items()
}
NUMERIC = {name: arguments for name, arguments in NUMERIC.items() if arguments}
# The steps of these compile more than the others.
LONG = {"gradual", "straight_through", "track_importance"} | {
    "track_gradients",
    "contrib.lora",
    "keep_masks",
    "masks.make",
    "prune",
}


def is_refused(error):
    """Whether it is one sentence, and a rule of this package said it."""
    sentence = str(error).split("\n--------------------\nFor simplicity")[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    said_here = Path(last.filename).is_relative_to(PACKAGE)
    return (
        said_here
        and isinstance(error, ValueError | TypeError)
        and (not faults(sentence))
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full if name in LONG else [])
        for name in NUMERIC
    ],
)
def test_numbers_out_of_range_are_refused_in_a_sentence(name):
    function, arguments = CALLS[name]
    function(**arguments)
    raw = []
    for argument in NUMERIC[name]:
        for label, value in WRONG.items():
            try:
                function(**arguments | {argument: value})
            except Exception as error:
                if not is_refused(error):
                    raw.append(f"{argument}={label}: {type(error).__name__}: {error}")
    assert raw == []


# Functions of arrays, and the arguments that are arrays.
TRACEABLE = {
    "masks.make": {"scores"},
    "masks.apply": {"params", "masks"},
    "masks.pack": {"masks"},
    "masks.unpack": {"packed"},
    "masks.get": {"state"},
    "masks.replace": {"state", "masks"},
    "masks.combine": {"first", "second"},
    "masks.above": {"scores", "threshold"},
    "prune": {"params", "scores"},
    "get_importance": {"state"},
    **{
        f"scores.{name}": {"params", "importance"}
        for name in dir(jp.scores)
        if f"scores.{name}" in CALLS
    },
}


def test_every_public_function_of_scores_and_masks_has_a_row():
    public = {f"scores.{name}" for name in dir(jp.scores)}
    public |= {f"masks.{name}" for name in dir(jp.masks)} - {"masks.PackedMask"}
    assert public <= CALLS.keys()


@pytest.mark.parametrize("name", TRACEABLE)
def test_results_under_jit_equal_eager_ones(name):
    function, arguments = CALLS[name]
    traced = {k: v for k, v in arguments.items() if k in TRACEABLE[name]}
    static = {k: v for k, v in arguments.items() if k not in traced}
    eager = function(**arguments)
    jitted = jax.jit(lambda traced: function(**traced, **static))(traced)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for expected, leaf in zip(*map(jax.tree.leaves, (eager, jitted)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
