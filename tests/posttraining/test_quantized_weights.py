"""Kept weights on few levels: GPTQ's sweep beside SparseGPT's, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.lm.checkpoints import levels
from jaxprune.posttraining.solvers import sparsegpt
from jaxprune.posttraining.solvers.quantization import Quantization
from tests.support import oracles_trained as slow
from tests.support import resumed
from tests.support.chained import chained
from tests.support.small_models import draw, prune
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

IN, OUT, GROUP = 72, 6, 32  # three groups, the last in part
INT4 = jp.passes.quantize("int4", group=16)
problem = functools.partial(slow.problem, size=IN, outputs=OUT, rows=300)


def lie_on_levels(weight, quantization):
    grid = levels.Grid(quantization.bits, quantization.group)
    found = levels.find_scales(np.asarray(weight), grid)
    return found is not None and found.axis == -2


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("pattern", "inner", "choose", "removed"),
    [
        (jp.patterns.Unstructured(), GROUP, slow.choose_unstructured, IN * OUT // 2),
        pytest.param(
            jp.patterns.NM(2, 4),
            4,
            lambda *_: slow.choose_nm(2, 4),
            0,
            marks=pytest.mark.full,
        ),
    ],
    ids=["unstructured", "2:4"],
)
def test_the_sweep_rounds_and_makes_up_for_it_as_the_formulas_say(
    bits, pattern, inner, choose, removed
):
    weight, hessian = problem(bits)
    quantization = Quantization(bits, GROUP)
    kept = weight.size - removed
    found = sparsegpt.solve(
        jnp.asarray(weight),
        jnp.asarray(hessian),
        kept,
        pattern=pattern,
        quantization=quantization,
    )
    expected, mask = slow.sparsegpt(
        weight, hessian, 0.01, GROUP, inner, choose(removed, IN), bits
    )
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.weight, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(found.weight)[~mask].any()
    assert lie_on_levels(found.weight, quantization)


@pytest.mark.full
def test_long_groups_of_a_pattern_share_the_scales_of_the_quantizations_groups():
    quantization = Quantization(4, 32)
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    inputs = slow.inputs(300, 64, 0)
    hessian = (inputs.T @ inputs).astype(np.float32)
    found = sparsegpt.solve(
        *map(jnp.asarray, (weight, hessian)),
        0,
        pattern=jp.patterns.NM(8, 16),
        quantization=quantization,
    )
    choose = slow.choose_nm(8, 16)
    expected, mask = slow.sparsegpt(weight, hessian, 0.01, 32, 16, choose, 4)
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.weight, expected, rtol=1e-5, atol=1e-6)
    assert lie_on_levels(found.weight, quantization)


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_levels_are_each_groups_own(bits):
    weight, _ = problem(7)
    found = np.asarray(Quantization(bits, GROUP).nearest(jnp.asarray(weight)))
    for first in range(0, IN, GROUP):
        own = weight[first : first + GROUP].astype(np.float64)
        expected = slow.on_levels(own, slow.level_scale(own, bits), bits)
        np.testing.assert_allclose(found[first : first + GROUP], expected, rtol=1e-6)
    # A small negative weight becomes a plain zero, whose bits are all zero.
    assert not np.signbit(found[found == 0]).any()


@pytest.mark.full
def test_making_up_for_quantization_beats_nearest_levels_afterwards():
    quantization = Quantization(4, GROUP)
    for seed in range(3):
        weight, hessian = problem(seed)
        matrix = jp.passes.Matrix(
            jnp.asarray(weight),
            jnp.asarray(np.diagonal(hessian)),
            jnp.asarray(hessian),
            np.uint32(weight.size // 2),
            jp.patterns.Unstructured(),
        )
        for method in (jp.passes.sparsegpt(block=GROUP), jp.passes.alps()):
            plain = method.solve(matrix)
            chain = chained(method, quantize=jp.passes.quantize("int4", group=GROUP))
            found = chain.solve(matrix._replace(quantization=chain.quantization))
            swept = slow.loss(weight, found.weight, hessian)
            afterwards = quantization.nearest(plain.weight)
            assert swept < slow.loss(weight, afterwards, hessian)
            if isinstance(method, jp.passes.alps):  # whose support is the same
                assert slow.loss(weight, plain.weight, hessian) < swept
            assert not np.asarray(found.weight)[~np.asarray(found.mask)].any()
            assert lie_on_levels(found.weight, quantization)


def tiny():
    """A function of two matmuls, its parameters and four batches."""

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": draw(0, 32, 32), "down": draw(1, 32, 32)}
    return fn, params, [draw(i, 64, 32) for i in range(2, 6)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("wanda", {}),
        ("magnitude", {}),
        ("sparsegpt", {}),
        ("alps", {"pattern": "2:4", "sparsity": None}),
    ],
)
def test_a_trained_model_ends_on_its_levels(method, how):
    quantization = Quantization(4, 16)
    fn, params, batches = tiny()
    method = chained(method, quantize=INT4)
    result = prune(fn, params, batches, method, **how)
    assert result.report["quantization"] == "Quantization(bits=4, group=16)"
    assert result.report["achieved"] >= 0.5
    for name, leaf in result.params.items():
        assert lie_on_levels(leaf, quantization), name
        assert (np.asarray(leaf) == 0).sum() >= leaf.size // 2


@pytest.mark.full
def test_weights_of_two_bytes_lie_on_levels_too():
    fn, params, batches = tiny()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for bits in (4, 8):
        quantization = Quantization(bits, 16)
        quantize = jp.passes.quantize(f"int{bits}", group=16)
        method = chained("sparsegpt", quantize=quantize)
        result = prune(fn, params, batches, method, None, pattern="2:4")
        for name, leaf in result.params.items():
            assert leaf.dtype == jnp.bfloat16
            assert lie_on_levels(leaf, quantization), name


@pytest.mark.full
def test_names_stand_for_groups_of_128():
    fn, params, batches = tiny()
    options = {"sparsity": 0.5}
    named, given = (
        jp.prune_trained(
            fn, params, batches, chained("magnitude", quantize=q), **options
        )
        for q in (jp.passes.quantize("int8"), jp.passes.quantize("int8", group=128))
    )
    assert named.report["quantization"] == "Quantization(bits=8, group=128)"
    assert same_bits(named.params, given.params)


@pytest.mark.full
def test_a_rounded_job_resumes_and_is_another_job_than_one_that_is_not(
    tmp_path, monkeypatch
):
    fn, params, batches = tiny()
    options = {"method": "sparsegpt", "sparsity": 0.5}
    method = chained("sparsegpt", quantize=INT4)
    rounded = {**options, "method": method, "directory": tmp_path}
    once = jp.prune_trained(fn, params, batches, **rounded)
    found = resumed.reads(monkeypatch)
    again = jp.prune_trained(fn, params, batches, **rounded)
    assert {*found} == {True}
    assert same_bits(once.params, again.params)
    with pytest.raises(ValueError, match="quantization"):
        jp.prune_trained(fn, params, batches, **options, directory=tmp_path)


@pytest.mark.full
def test_over_a_mesh_the_levels_are_those_of_one_device():
    fn, params, batches = tiny()
    method = chained("sparsegpt", quantize=INT4)
    options = {"method": method, "sparsity": 0.5}
    alone = jp.prune_trained(fn, params, batches, **options)
    mesh = jax.make_mesh((4,), ("data",))
    spread = jp.prune_trained(fn, params, batches, mesh=mesh, **options)
    assert same_bits(alone.params, jax.device_get(spread.params))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"pattern": jp.patterns.Block(4, 4)},
            "quantize takes Unstructured, PerOutput and NM, got Block",
        ),
        (
            {"pattern": "3:6", "sparsity": None},
            "must be whole groups of NM.*got 128 inputs",
        ),
    ],
)
def test_what_has_no_levels_is_refused(changes, told):
    fn, params, batches = tiny()
    method = chained("sparsegpt", quantize=jp.passes.quantize())
    options = {"method": method, "sparsity": 0.5}
    if changes.get("pattern") == "3:6":
        params = {name: leaf[:30, :30] for name, leaf in params.items()}
        batches = [batch[:, :30] for batch in batches]
    with pytest.raises(ValueError, match=told):
        prune(fn, params, batches, **{**options, **changes})


@pytest.mark.parametrize(
    ("numbers", "told"),
    [((3, 128), "bits must be 4 or 8"), ((4, 100), "a multiple of 16 inputs, got 100")],
)
def test_levels_that_no_file_holds_are_refused(numbers, told):
    with pytest.raises(ValueError, match=told):
        Quantization(*numbers)


@pytest.mark.parametrize("levels", ["int3", 4, None])
def test_levels_of_another_name_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be one of int4, int8, got"):
        jp.passes.quantize(levels)
