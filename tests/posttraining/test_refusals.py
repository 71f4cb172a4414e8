"""What cannot be pruned is refused before anything is done, in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support import small_models
from tests.support.small_models import chain, correlated, draw, run_chain
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

PARAMS = chain([6, 6, 6])
BATCHES = [correlated(i, 12, 6) for i in range(2)]
W = draw(0, 6, 6)


def prune(fn=run_chain, params=PARAMS, batches=BATCHES, **options):
    return small_models.prune(fn, params, batches, **options)


def product(p, x):
    return x @ p["w"]


def broken(value):
    params = chain([6, 6, 6])
    kernel = params["layer_1"]["kernel"] = np.array(params["layer_1"]["kernel"])
    kernel[2, 3] = value
    return params


NM = jp.patterns.NM(2, 4)
REFUSED = {
    "an unknown method": ({"method": "lasso"}, "magnitude, wanda, ria, sparsegpt"),
    "unknown inputs": (
        {"method": "wanda", "inputs": "whole"},
        "inputs must be one of left, dense, got 'whole'",
    ),
    "no batch": ({"batches": []}, "at least one batch"),
    "batches of two shapes": (
        {"batches": [*BATCHES, BATCHES[0][:5]]},
        r"shapes and dtypes of the first, but those at 2 differ",
    ),
    "batches of two dtypes": (
        {"batches": [BATCHES[0], BATCHES[1].astype(np.float16)]},
        r"shapes and dtypes of the first, but those at 1 differ",
    ),
    "NaN in a weight": ({"params": broken(np.nan)}, r"layer_1/kernel' hold NaN"),
    "infinity in a weight": ({"params": broken(np.inf)}, "layer_1/kernel"),
    "no sparsity": ({"sparsity": None}, "give sparsity=0.5"),
    "all of it": ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
    "less than nothing": ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
    "no number": ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\)"),
    "per cent": ({"sparsity": 60}, "give 0.6 for 60 %"),
    "a glob for nothing": ({"sparsity": {"mlp/*": 0.5}}, "'mlp/.' match none"),
    "a share of a glob": ({"sparsity": {"*": 2}}, r"must be in \[0, 1\), .* for '\*'"),
    "n of m against sparsity": (
        {"pattern": jp.patterns.NM(1, 2), "sparsity": 0.7},
        "removes exactly 0.5",
    ),
    "shares and rules": (
        {"sparsity": {"*": 0.5}, "allocation": jp.allocation.ERK()},
        "ERK.* needs one sparsity",
    ),
    "shares and n of m": (
        {
            "sparsity": None,
            "pattern": jp.patterns.NM(1, 2),
            "allocation": jp.allocation.OWL(),
        },
        "OWL.* needs one sparsity",
    ),
    "nothing to prune": ({"prunable": lambda name, leaf: False}, "there is none"),
    "positions that do not fit": (
        {"positions": lambda x: jnp.ones(5, bool)},
        "positions must have the shape",
    ),
    "no position": (
        {"positions": lambda x: jnp.zeros(12, bool), "method": "wanda"},
        "some position must count",
    ),
    "channels that a solver cannot take": (
        {"method": "sparsegpt", "pattern": jp.patterns.Channel()},
        "Channel",
    ),
}


# Seen only when the statistics are complete.
LATE = {"no position"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name, tmp_path):
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        prune(directory=tmp_path / "progress", **options)
    assert "\n" not in str(caught.value)
    assert name in LATE or not list(tmp_path.iterdir())


@pytest.mark.parametrize("sparsity", [True, "0.5", [0.5]])
def test_a_sparsity_of_another_kind_is_a_type_error(sparsity):
    with pytest.raises(TypeError, match="sparsity must be a number"):
        prune(sparsity=sparsity)


def test_all_weights_that_groups_do_not_fit_are_named():
    params = chain([6, 8, 7, 4])
    with pytest.raises(ValueError, match="divisible by 4") as caught:
        prune(params=params, pattern=NM, sparsity=None)
    for name, fits in (("layer_0", False), ("layer_1", True), ("layer_2", False)):
        assert (f"'{name}/kernel'" in str(caught.value)) != fits
    assert "prunable" in str(caught.value)
    # Left out, the rest is pruned.
    pruned, _ = prune(
        params=params,
        pattern=NM,
        sparsity=None,
        prunable=jp.tree.excluding("layer_[02]/*"),
    )
    assert (np.asarray(pruned["layer_1"]["kernel"]) == 0).mean() == 0.5


def test_parameters_without_values_are_refused():
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS
    )
    with pytest.raises(ValueError, match=r"arrays with values.*layer_0/kernel"):
        prune(params=abstract)


def test_pruning_inside_jit_is_refused():
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda params: prune(params=params).params)(PARAMS)


def test_batches_inside_jit_are_refused():
    with pytest.raises((ValueError, TypeError), match=r"jit|[Tt]race"):
        jax.jit(lambda x: prune(batches=[x]).params)(BATCHES[0])


def test_a_weight_that_is_hidden_is_named_with_the_reason():
    with pytest.raises(ValueError, match="'w': 'is an operand of add"):
        prune(lambda p, x: x @ (p["w"] + 2), {"w": W}, BATCHES)


def test_a_weight_used_whole_and_in_part_is_refused():
    with pytest.raises(ValueError, match="overlap") as caught:
        prune(lambda p, x: (x @ p["w"], x[:, :3] @ p["w"][:3]), {"w": W}, BATCHES)
    assert "'w'" in str(caught.value)
    assert "'w[0:3,:]'" in str(caught.value)


def test_a_tied_weight_seen_in_two_ways_is_pruned_by_the_first():
    # x @ w and then @ w.T: one weight, two matrices.
    w = draw(1, 6, 6)
    pruned, report = prune(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": w}, BATCHES
    )
    assert [row["name"] for row in report["weights"]] == ["w"]
    assert (np.asarray(pruned["w"]) == 0).sum() == 18


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_input_that_is_not_finite_is_named_and_the_parameters_stay(method):
    params = jax.tree.map(jnp.array, PARAMS)

    def fn(p, x):
        x = x @ p["layer_0"]["kernel"]
        return jnp.log(-jnp.abs(x)) @ p["layer_1"]["kernel"]

    with pytest.raises(ValueError, match="'layer_1/kernel' must be finite"):
        prune(fn, params, method=method)
    assert same_bits(params, PARAMS)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_inputs_that_never_fire_are_no_reason_to_fail(method):
    x = BATCHES[0] * np.array([1, 0, 1, 0, 1, 1], np.float32)
    pruned, report = prune(params=PARAMS, batches=[x], method=method)
    for layer in pruned.values():
        assert np.isfinite(np.asarray(layer["kernel"])).all()
        assert (np.asarray(layer["kernel"]) == 0).sum() >= 18
    if method != "magnitude":  # what costs nothing goes first
        first = np.asarray(pruned["layer_0"]["kernel"])
        assert not first[[1, 3]].any()
    assert report["achieved"] >= 0.5


def test_inputs_that_are_all_zero_are_no_reason_to_fail():
    pruned, report = prune(
        product, {"w": W}, [np.zeros((5, 6), np.float32)], method="sparsegpt"
    )
    assert np.isfinite(np.asarray(pruned["w"])).all()
    assert (np.asarray(pruned["w"]) == 0).sum() >= 18
    assert report["weights"][0]["error"] == 0  # the output is zero anyway
