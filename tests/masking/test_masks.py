"""Masks and prune: zeros where removed, all else untouched, bad input refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import (
    Module,
    array,
    bits,
    containers,
    same_bits,
    weights,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def everything(name, leaf):
    return True


def pruned_and_mask(params, sparsity, **options):
    scores = jp.scores.magnitude(params)
    masks = jp.masks.make(scores, sparsity, **options)
    return jp.prune(params, scores, sparsity, **options), masks


@given(
    kind=st.sampled_from(
        [
            *((jnp.float32, shape) for shape in [(3, 4), (0, 3), (2, 3, 2)]),
            (jnp.bfloat16, (3, 4)),
            (jnp.float16, (1, 7)),
        ]
    ),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9999999]),
    allocation=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_prune_is_where_of_its_mask(kind, sparsity, allocation, seed):
    dtype, shape = kind
    rng = np.random.default_rng(seed)
    values = [np.round(rng.normal(size=shape), 1) for _ in range(2)]  # with ties
    params = {
        k: jnp.asarray(v.astype(dtype)) for k, v in zip("mn", values, strict=True)
    }
    pruned, _ = pruned_and_mask(params, sparsity, allocation=allocation)
    keep = oracles.keep_layer if allocation == "layer" else oracles.keep_global
    masks = keep([np.abs(array(params[k])) for k in "mn"], sparsity)
    for name, mask in zip("mn", masks, strict=True):
        expected = np.where(mask, np.asarray(params[name]), np.zeros((), dtype))
        assert pruned[name].dtype == dtype
        np.testing.assert_array_equal(bits(pruned[name]), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_removed_weights_become_plus_zero_whatever_they_were(dtype):
    special = jnp.asarray(
        np.array([[np.nan, np.inf, -np.inf], [-0.0, -3.0, 5.0]], dtype)
    )
    masks = {"k": jnp.array([[False] * 3, [False, False, True]])}
    out = jp.masks.apply({"k": special}, masks)
    assert same_bits(out, {"k": np.array([[0, 0, 0], [0, 0, 5]], dtype)})
    kept = jp.masks.apply({"k": special}, {"k": np.ones((2, 3), bool)})
    assert same_bits(kept, {"k": special})


def test_prune_removes_nan_weights_that_score_lowest():
    params = {"k": jnp.array([[jnp.nan, 1.0], [jnp.inf, 2.0]])}
    out = jp.prune(params, {"k": jnp.array([[0.0, 2.0], [1.0, 3.0]])}, 0.5)
    assert same_bits(out, {"k": jnp.array([[0.0, 1.0], [0.0, 2.0]])})


def test_unprunable_leaves_come_back_as_the_same_objects():
    params = weights()
    pruned, masks = pruned_and_mask(params, 0.5)
    for out in (pruned, jp.masks.apply(params, masks)):
        assert out["layer"]["bias"] is params["layer"]["bias"]
        assert out["token_embedding"] is params["token_embedding"]
        assert out["layer"]["kernel"] is not params["layer"]["kernel"]
    assert isinstance(masks["layer"]["bias"], optax.MaskedNode)


@pytest.mark.parametrize("name", containers())
def test_every_kind_of_tree_is_pruned_in_its_own_kind(name):
    params = containers()[name]
    scores = jp.scores.magnitude(params, prunable=everything)
    masks = jp.masks.make(scores, 0.6, allocation="layer")
    pruned = jp.prune(params, scores, 0.6, allocation="layer")
    for out in (pruned, jp.masks.apply(params, masks)):
        assert jax.tree.structure(out) == jax.tree.structure(params)
        assert type(out) is type(params)
        zeros = [int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(out)]
        sizes = [x.size for x in jax.tree.leaves(params)]
        assert zeros == [oracles.removed_count(0.6, size) for size in sizes]
        shapes = jax.eval_shape(lambda p, s: jp.prune(p, s, 0.6), params, scores)
        assert jax.tree.structure(shapes) == jax.tree.structure(params)


def test_prune_under_jit_is_the_same():
    params = containers()["nnx.State"]
    scores = jp.scores.magnitude(params, prunable=everything)
    prune = lambda p, s: jp.prune(p, s, 0.6)  # noqa: E731
    assert same_bits(jax.jit(prune)(params, scores), prune(params, scores))


def test_names_are_paths_whatever_the_tree():
    a = jnp.ones((2, 2))
    assert jp.tree.names({"blocks": [{"kernel": a}, {"kernel": a}]}) == [
        "blocks/0/kernel",
        "blocks/1/kernel",
    ]
    assert jp.tree.names((a, (a,))) == ["0", "1/0"]
    assert jp.tree.names(Module(a, a)) == ["kernel", "bias"]
    assert jp.tree.names(containers()["namedtuple"]) == ["kernel", "bias"]
    state = nnx.State({"dense": {"kernel": nnx.Param(a)}})
    assert jp.tree.names(state) == ["dense/kernel"]


def test_scalar_and_empty_leaves_are_counted():
    scores = {"a": jnp.float32(3.0), "b": jnp.zeros((0, 3)), "c": jnp.ones((1, 1))}
    for allocation in ("layer", "global"):
        masks = jp.masks.make(scores, 0.4, allocation=allocation)
        assert {k: m.shape for k, m in masks.items()} == {
            "a": (),
            "b": (0, 3),
            "c": (1, 1),
        }
    lowest = jp.masks.make(scores, 0.5, allocation="global")
    assert bool(lowest["a"])
    assert not bool(lowest["c"][0, 0])


def test_rules_give_each_leaf_the_first_share_that_matches():
    leaves = {name: {"kernel": jnp.arange(10.0)} for name in ("attention", "mlp", "z")}
    rules = {"attention/*": 0.2, "*/kernel": 0.7}
    masks = jp.masks.make(leaves, rules)
    kept = {name: int(m["kernel"].sum()) for name, m in masks.items()}
    assert kept == {"attention": 8, "mlp": 3, "z": 3}
    masks = jp.masks.make(leaves, {"mlp/kernel": 0.5})
    kept = {name: int(m["kernel"].sum()) for name, m in masks.items()}
    assert kept == {"attention": 10, "mlp": 5, "z": 10}


def test_a_rule_that_matches_nothing_is_an_error_naming_it():
    scores = {"a": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="atention"):
        jp.masks.make(scores, {"a/*": 0.5, "atention/*": 0.5})


@pytest.mark.parametrize("bad", [1.0, 1.5, -0.1, float("nan"), float("inf"), 60])
@pytest.mark.parametrize("as_rule", [False, True])
def test_sparsity_out_of_range_is_refused(bad, as_rule):
    scores = {"a": jnp.ones((2, 2))}
    sparsity = {"*": bad} if as_rule else bad
    with pytest.raises(ValueError, match=r"sparsity.*\[0, 1\)"):
        jp.masks.make(scores, sparsity)
    with pytest.raises(ValueError, match=r"sparsity.*\[0, 1\)"):
        jp.prune(scores, scores, sparsity)


@pytest.mark.parametrize("bad", [True, False, "0.5", [0.5], None])
def test_sparsity_of_another_kind_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match="sparsity"):
        jp.masks.make({"a": jnp.ones((2, 2))}, bad)


@pytest.mark.parametrize("sparsity", [0, np.float32(0.5), np.float64(0.5)])
def test_sparsity_may_be_any_real_number(sparsity):
    masks = jp.masks.make({"a": jnp.arange(4.0)}, sparsity)
    assert int(masks["a"].sum()) == 4 - round(4 * float(sparsity))


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match=r"allocation.*model|model.*allocation"):
        jp.masks.make({"a": jnp.ones((2, 2))}, 0.5, allocation="model")


def test_integer_scores_are_refused_by_name():
    with pytest.raises(TypeError, match=r"h/k"):
        jp.masks.make({"h": {"k": jnp.ones((2, 2), jnp.int32)}}, 0.5)
    with pytest.raises(TypeError, match=r"h/k"):
        jp.masks.make({"h": {"k": jnp.ones((2, 2), bool)}}, 0.5)


def ones(*shape):
    return jnp.asarray(np.ones(shape, np.float32))


PARAMS = {"a": {"kernel": ones(2, 3)}, "b": {"kernel": ones(3, 2)}}
OTHERS = {
    "shape": ({"a": {"kernel": ones(3, 2)}, "b": PARAMS["b"]}, "a/kernel"),
    "name": ({"a": PARAMS["a"], "c": PARAMS["b"]}, r"\b[bc]/kernel"),
    "missing": ({"a": PARAMS["a"]}, "b/kernel"),
    "extra": ({**PARAMS, "zz": ones(2, 2)}, "zz"),
    "empty": ({}, "kernel"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_scores_and_masks_of_another_model_are_refused_by_name(case):
    other, names = OTHERS[case]
    masks = jax.tree.map(lambda x: x > 0, other)
    with pytest.raises(ValueError, match=names):
        jp.prune(PARAMS, other, 0.5)
    with pytest.raises(ValueError, match=names):
        jp.masks.apply(PARAMS, masks)
    with pytest.raises(ValueError, match=names):
        jp.keep_masks(optax.sgd(0.1), masks).init(PARAMS)
    with pytest.raises(ValueError, match=names):
        jp.masks.combine(jax.tree.map(lambda x: x > 0, PARAMS), masks)


def test_masks_that_are_not_boolean_are_refused():
    numbers = jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.raises(TypeError, match="a/kernel"):
        jp.masks.apply(PARAMS, numbers)
    with pytest.raises(TypeError, match="a/kernel"):
        jp.keep_masks(optax.sgd(0.1), numbers).init(PARAMS)
    with pytest.raises(TypeError, match="a/kernel"):
        jp.masks.pack(numbers)


@pytest.mark.parametrize("excluded", [None, True])
def test_none_and_true_exclude_a_leaf_as_a_masked_node_does(excluded):
    mask = jnp.array([[True, False, True], [False, True, True]])
    given = {"a": {"kernel": mask}, "b": {"kernel": excluded}}
    nodes = {"a": {"kernel": mask}, "b": {"kernel": optax.MaskedNode()}}
    assert same_bits(jp.masks.apply(PARAMS, given), jp.masks.apply(PARAMS, nodes))
    assert jp.masks.apply(PARAMS, given)["b"]["kernel"] is PARAMS["b"]["kernel"]
    states = [jp.keep_masks(optax.sgd(0.1), m).init(PARAMS) for m in (given, nodes)]
    assert same_bits(*states)
    full = jax.tree.map(lambda x: x > 0, PARAMS)
    for pair in ((given, full), (full, given), (given, given)):
        both = jp.masks.combine(*pair)
        np.testing.assert_array_equal(np.asarray(both["a"]["kernel"]), mask)
    assert bool(jp.masks.combine(given, full)["b"]["kernel"].all())


def test_a_none_that_the_parameters_have_too_is_no_leaf():
    params = {"kernel": jnp.ones(2), "bias": None}
    masks = {"kernel": jnp.array([True, False]), "bias": None}
    assert jp.masks.apply(params, masks)["bias"] is None
    assert jp.masks.combine(masks, masks)["bias"] is None


def test_false_for_a_mask_is_refused_by_name():
    given = {"a": {"kernel": False}, "b": {"kernel": True}}
    with pytest.raises(ValueError, match=r"masks must have the shapes.*a/kernel"):
        jp.masks.apply(PARAMS, given)


def test_nan_scores_are_refused_by_prune_too():
    scores = {"a": PARAMS["a"], "b": {"kernel": jnp.full((3, 2), jnp.nan)}}
    with pytest.raises(ValueError, match="b/kernel"):
        jp.prune(PARAMS, scores, 0.5)


def test_combine_keeps_what_both_keep():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 5, 6)) > 0.5
    node = optax.MaskedNode()
    out = jp.masks.combine(
        {"k": jnp.asarray(a), "n": node}, {"k": jnp.asarray(b), "n": node}
    )
    np.testing.assert_array_equal(np.asarray(out["k"]), a & b)
    assert isinstance(out["n"], optax.MaskedNode)


@given(
    shape=st.sampled_from([(), (0,), (7,), (9,), (3, 16), (2, 3, 4)]),
    seed=st.integers(0, 1000),
)
def test_packing_is_one_bit_a_weight_and_comes_back(shape, seed):
    mask = np.asarray(np.random.default_rng(seed).random(shape) > 0.5)
    masks = {"k": jnp.asarray(mask), "n": optax.MaskedNode()}
    packed = jp.masks.pack(masks)
    width = mask.shape[-1] if mask.ndim else 1
    rows = mask.size // max(width, 1)  # each row is filled up to whole bytes
    assert sum(x.nbytes for x in jax.tree.leaves(packed)) <= rows * -(-width // 8)
    assert same_bits(jp.masks.unpack(packed), masks)


def test_packing_works_under_jit():
    masks = {"k": jnp.asarray(np.arange(21).reshape(3, 7) % 3 == 0)}
    packed = jax.jit(jp.masks.pack)(masks)
    assert same_bits(jax.jit(jp.masks.unpack)(packed), masks)


def test_sparsity_counts_zeros_exactly():
    params = {"a": jnp.array([[0.0, -0.0], [1.0, jnp.nan]]), "b": [jnp.ones((3,))]}
    report = jp.sparsity(params)
    assert report.by_leaf == {"a": (2, 4), "b/0": (0, 3)}
    assert report.total == 2 / 7
    assert all(type(n) is int for pair in report.by_leaf.values() for n in pair)
    assert jp.sparsity({"a": jnp.zeros((0, 2))}).total == 0.0


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.99])
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_what_prune_removes_is_what_sparsity_reports(sparsity, allocation):
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(9, 11)), jnp.float32) for n in "xyz"}
    pruned, masks = pruned_and_mask(params, sparsity, allocation=allocation)
    share = (
        round(sparsity * 297) if allocation == "global" else 3 * round(sparsity * 99)
    )
    for tree in (pruned, masks):
        zeros = [z for z, _ in jp.sparsity(tree).by_leaf.values()]
        assert sum(zeros) == share


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("where", [(0, 0), (500, 3), (999, 1023)])
def test_one_nan_among_a_million_scores_is_found(dtype, where):
    scores = np.ones((1000, 1024), dtype)
    scores[where] = np.nan
    with pytest.raises(ValueError, match="must not be NaN"):
        jp.masks.make({"w": jnp.asarray(scores)}, 0.5)


def test_numpys_doubles_are_ranked_in_the_precision_that_jax_has():
    scores = {"w": np.random.default_rng(0).random((6, 7))}  # float64
    single = {"w": scores["w"].astype(np.float32)}
    for own in (lambda s: jp.masks.make(s, 0.5), lambda s: jp.masks.above(s, 0.5)):
        np.testing.assert_array_equal(own(scores)["w"], own(single)["w"])
    assert jp.sparsity(jp.prune(single, scores, 0.5)).total == 0.5


@pytest.mark.parametrize("allocation", ["layer", "global", "erk"])
def test_an_empty_leaf_is_nothing_to_share_out(allocation):
    scores = {"empty": jnp.zeros((0, 4)), "w": jnp.arange(16.0).reshape(4, 4)}
    masks = jp.masks.make(scores, 0.5, allocation=allocation)
    assert masks["empty"].shape == (0, 4)
    assert int(masks["w"].sum()) == 8


def test_a_leaf_with_more_weights_than_a_ranking_counts_is_refused_by_name():
    large = {"experts": jax.ShapeDtypeStruct((48, 128, 2048, 768), np.float32)}
    with pytest.raises(ValueError, match="'experts' have more; rank the matrices"):
        jax.eval_shape(lambda scores: jp.masks.make(scores, 0.5), large)


@pytest.mark.parametrize(
    ("shape", "given"),
    [((2**16, 2**16), {"sparsity": 0.5}), ((4, 2**16, 2**16), {"pattern": "2:4"})],
)
def test_a_matrix_with_more_weights_than_a_ranking_counts_is_refused(shape, given):
    large = {"w": jax.ShapeDtypeStruct(shape, np.float32)}
    ranked = lambda scores: jp.masks.make(scores, allocation="matrix", **given)  # noqa: E731
    with pytest.raises(ValueError, match="'w' have more; split the leaf"):
        jax.eval_shape(ranked, large)


def test_masks_of_numpy_and_from_elsewhere_are_taken_by_a_leaf_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    where = NamedSharding(mesh, PartitionSpec("x"))
    own, other = np.eye(4, dtype=bool), np.ones((4, 4), bool)
    spread = {"w": jax.device_put(own, where)}
    committed = {"w": jax.device_put(other, jax.devices()[0])}
    applied = jp.masks.apply({"w": jax.device_put(np.ones((4, 4)), where)}, {"w": own})
    assert np.asarray(applied["w"]).sum() == 4
    for masks in ({"w": other}, committed):
        assert np.asarray(jp.masks.combine(spread, masks)["w"]).sum() == 4
        assert jp.masks.overlap(spread, masks).total == 4 / 16
