"""Every optimizer and wrapper of optax, under a tracker and under masks.

For each: the tracker changes no bit of the training, its average is the float64
oracle's, what the masks remove stays zero, and XLA compiles as often as without them.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxprune as jp
from tests.support import oracles
from tests.support.compilations import compiled
from tests.support.trajectories import array, bits

STEPS = 4
PARAMS = {
    "kernel": jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]),
    "bias": jnp.array([0.1, -0.2]),
}
MASKS = {
    "kernel": jnp.array([[True, False, True], [False, True, True]]),
    "bias": optax.MaskedNode(),
}
KEY = jax.random.key(0)
LABELS = {"kernel": "a", "bias": "b"}


def scaled(transform):
    """A step of what gives a direction."""
    return optax.chain(transform, optax.scale(-0.01))


def always(step, **_):
    return step >= 1


SGD = optax.sgd(0.1)
OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adafactor": optax.adafactor(0.1),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adamax": optax.adamax(0.1),
    "adamaxw": optax.adamaxw(0.1),
    "adamw": optax.adamw(0.1),
    "adan": optax.adan(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "fromage": optax.fromage(0.1),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "lbfgs": optax.lbfgs(0.1),
    "lion": optax.lion(0.1),
    "noisy_sgd": optax.noisy_sgd(0.1, key=KEY),
    "novograd": optax.novograd(0.1),
    "optimistic_adam_v2": optax.optimistic_adam_v2(0.1),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": optax.polyak_sgd(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1, bias_correction=True, centered=True),
    "rprop": optax.rprop(0.1),
    "sgd": optax.sgd(0.1, 0.9, nesterov=True),
    "sign_sgd": optax.sign_sgd(0.1),
    "signum": optax.signum(0.1),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.1),
    "acprop": contrib.acprop(0.1),
    "ademamix": contrib.ademamix(0.1),
    "adopt": contrib.adopt(0.1),
    "cocob": contrib.cocob(0.1),
    "dadapt_adamw": contrib.dadapt_adamw(0.1),
    "dog": contrib.dog(1.0, ("learning_rate", 0.1)),
    "dowg": contrib.dowg(0.1),
    "galore": contrib.galore(0.1, rank=1),
    "madgrad": contrib.madgrad(0.1),
    "momo": contrib.momo(0.1),
    "momo_adam": contrib.momo_adam(0.1),
    "muon": contrib.muon(0.1),
    "prodigy": contrib.prodigy(0.1),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.1),
    "simplified_ademamix": contrib.simplified_ademamix(0.1),
    "sophia": contrib.sophia(0.1),
}
WRAPPERS = {
    "apply_if_finite": optax.apply_if_finite(SGD, 2),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), SGD),
    "conditionally_mask": optax.conditionally_mask(SGD, always),
    "conditionally_transform": optax.conditionally_transform(SGD, always),
    "flatten": optax.flatten(optax.adam(0.1)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "masked": optax.masked(SGD, {"kernel": True, "bias": False}),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "multi_transform": optax.multi_transform({"a": optax.adam(0.1), "b": SGD}, LABELS),
    "named_chain": optax.named_chain(("first", optax.clip(1.0)), ("second", SGD)),
    "partition": optax.partition({"a": optax.adam(0.1), "b": SGD}, LABELS),
    "selective_transform": optax.selective_transform(
        SGD, freeze_mask={"kernel": False, "bias": True}
    ),
    "with_extra_args_support": optax.with_extra_args_support(SGD),
    "mechanize": contrib.mechanize(optax.adam(0.1)),
    "sam": contrib.sam(SGD, optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "schedule_free": contrib.schedule_free(SGD, 0.1),
    "split_real_and_imaginary": contrib.split_real_and_imaginary(optax.adam(0.1)),
}
PARTS = {
    "adaptive_grad_clip": scaled(optax.adaptive_grad_clip(0.1)),
    "add_decayed_weights": scaled(optax.add_decayed_weights(0.1)),
    "add_noise": scaled(optax.add_noise(0.1, 0.5, KEY)),
    "apply_every": scaled(optax.apply_every(2)),
    "centralize": scaled(optax.centralize()),
    "clip": scaled(optax.clip(0.1)),
    "clip_by_block_rms": scaled(optax.clip_by_block_rms(0.1)),
    "clip_by_global_norm": scaled(optax.clip_by_global_norm(0.1)),
    "ema": scaled(optax.ema(0.9)),
    "freeze": optax.chain(SGD, optax.freeze({"kernel": False, "bias": True})),
    "identity": scaled(optax.identity()),
    "keep_params_nonnegative": optax.chain(SGD, optax.keep_params_nonnegative()),
    "measure_with_ema": scaled(
        optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)})
    ),
    "monitor": scaled(optax.monitor({"norm": optax.tree.norm})),
    "normalize_by_update_norm": scaled(optax.normalize_by_update_norm()),
    "scale": optax.scale(-0.1),
    "scale_by_backtracking_linesearch": optax.chain(
        SGD, optax.scale_by_backtracking_linesearch(3)
    ),
    "scale_by_distance_over_gradients": scaled(
        optax.scale_by_distance_over_gradients()
    ),
    "scale_by_lbfgs": scaled(optax.scale_by_lbfgs(2)),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.1),
    "scale_by_param_block_norm": scaled(optax.scale_by_param_block_norm()),
    "scale_by_param_block_rms": scaled(optax.scale_by_param_block_rms()),
    "scale_by_rms": scaled(optax.scale_by_rms()),
    "scale_by_schedule": optax.scale_by_schedule(lambda n: -0.1 / (n + 1)),
    "scale_by_zoom_linesearch": optax.chain(SGD, optax.scale_by_zoom_linesearch(3)),
    "set_to_zero": optax.set_to_zero(),
    "snapshot": scaled(optax.snapshot("norm", optax.tree.norm)),
    "stateless": optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: -0.1 * g, updates)
    ),
    "stateless_with_tree_map": optax.stateless_with_tree_map(lambda g, w: -0.1 * g),
    "trace": scaled(optax.trace(0.9)),
    "zero_nans": scaled(optax.zero_nans()),
    "normalize": scaled(contrib.normalize()),
    "reduce_on_plateau": optax.chain(SGD, contrib.reduce_on_plateau(patience=1)),
}
TABLE = OPTIMIZERS | WRAPPERS | PARTS
# The optimizer of the table that is this part and a rate.
INSIDE = {
    "scale_by_adadelta": "adadelta",
    "scale_by_adam": "adam",
    "scale_by_adamax": "adamax",
    "scale_by_adan": "adan",
    "scale_by_amsgrad": "amsgrad",
    "scale_by_belief": "adabelief",
    "scale_by_lion": "lion",
    "scale_by_novograd": "novograd",
    "scale_by_optimistic_gradient": "optimistic_gradient_descent",
    "scale_by_polyak": "polyak_sgd",
    "scale_by_radam": "radam",
    "scale_by_rprop": "rprop",
    "scale_by_rss": "adagrad",
    "scale_by_sign": "sign_sgd",
    "scale_by_sm3": "sm3",
    "scale_by_stddev": "rmsprop",
    "scale_by_trust_ratio": "lamb",
    "scale_by_yogi": "yogi",
    "scale_by_acprop": "acprop",
    "scale_by_ademamix": "ademamix",
    "scale_by_adopt": "adopt",
    "scale_by_cocob": "cocob",
    "scale_by_galore": "galore",
    "scale_by_madgrad": "madgrad",
    "scale_by_simplified_ademamix": "simplified_ademamix",
}
ELSEWHERE = {
    "scale_by_muon": "it is in muon, which says what are matrices",
    "inject_stateful_hyperparams": "deprecated, and the same as inject_hyperparams",
    "optimistic_adam": "deprecated, and the same as optimistic_adam_v2",
    "lookahead": "its parameters are pairs: tests/training/test_keep_masks.py",
    "dpsgd": "it takes a gradient for each example",
    "differentially_private_aggregate": "it takes a gradient for each example",
}
# What reads other extra arguments than a line search's.
EXTRA = {"sophia": ["obj_fn"], "sam": []}
# Optax's own states that change their types at the first step.
TWICE = {
    "lbfgs",
    "measure_with_ema",
    "monitor",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
}
# One of each kind; the rest in the full suite.
CORE = {"partition", "sgd", "sophia"}


def loss(params):
    kernel = params["kernel"] * jnp.array([[1.0, 0.3, 0.01], [2.0, 0.1, 0.5]])
    return jnp.sum(kernel**2) / 2 + jnp.sum(jnp.cos(params["bias"]))


def trained(txs, extra_names):
    """All in one program: (weights, updates) by step and the last state of each.

    Then how often XLA compiled, by step.
    """
    txs = [optax.with_extra_args_support(tx) for tx in txs]

    def one(tx, params, state):
        value, grads = jax.value_and_grad(loss)(params)
        every = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        extra = {key: every[key] for key in extra_names}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), updates, state

    @jax.jit
    def step(runs):
        return [one(tx, *run) for tx, run in zip(txs, runs, strict=True)]

    runs, taken, counts = [(PARAMS, tx.init(PARAMS)) for tx in txs], [], []
    for _ in range(STEPS):
        with compiled() as programs:
            after = step(runs)
        counts.append(len(programs))
        taken.append(jax.device_get([made[:2] for made in after]))
        runs = [(params, state) for params, _, state in after]
    every = [(list(own), run[1]) for *own, run in zip(*taken, runs, strict=True)]
    return every, counts


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CORE else pytest.mark.full)
        for name in TABLE
    ],
)
@jax.numpy_rank_promotion("allow")  # as some of optax's need
def test_tracked_and_masked_it_trains_as_alone(name):
    tx, extra = TABLE[name], EXTRA.get(name, ["value", "grad", "value_fn"])
    ((plain, _), (kept, _)), alone = trained([tx, jp.keep_masks(tx, MASKS)], extra)
    tracked = optax.chain(tx, jp.track_importance())
    [(steps, state)], counts = trained([tracked], extra)
    assert counts == alone == [1, int(name in TWICE), 0, 0]
    for leaf in PARAMS:
        for (_, own), (_, other) in zip(plain, steps, strict=True):
            np.testing.assert_array_equal(bits(own[leaf]), bits(other[leaf]))
        values = np.stack([array(weights[leaf]) for weights, _ in steps])
        average = optax.tree.get(state, "weight")[leaf]
        expected = oracles.average(values, "power", 0.5)
        np.testing.assert_allclose(average, expected, atol=1e-6 * np.abs(values).max())

    removed = ~np.asarray(MASKS["kernel"])
    for weights, _ in kept:
        assert not weights["kernel"][removed].any()
        assert all(np.isfinite(x).all() for x in weights.values())


def test_the_table_has_all_that_optax_offers():
    if optax.__version__ != "0.2.8":
        pytest.skip("the table is of optax 0.2.8")
    offered = {
        name
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and "GradientTransformation" in str(inspect.signature(value)).split("->")[-1]
    }
    offered |= {"dog", "dowg", "MultiSteps"}  # classes, and without annotations
    assert offered == TABLE.keys() | INSIDE.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("part", INSIDE)
def test_a_part_without_a_row_is_in_the_optimizer_that_is_named(part):
    name = INSIDE[part]
    made = getattr(optax, name, None) or getattr(contrib, name)
    assert name in OPTIMIZERS
    assert f"{part}(" in inspect.getsource(made)
