"""Leaves, shares and masks at the edge of what the masks are made for."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.masking.allocation import Weight


def scores(**shapes):
    chance = np.random.default_rng(0)
    return {k: jnp.asarray(chance.uniform(1, 2, v), "f") for k, v in shapes.items()}


ATTENTION = {
    name: {"kernel": jnp.asarray(np.random.default_rng(n).normal(size=shape), "f")}
    for n, (name, shape) in enumerate(
        {"query": (8, 4, 2), "key": (8, 4, 2), "out": (4, 2, 8)}.items()
    )
}


def test_heads_whose_other_half_is_left_out_need_axes():
    rule = jp.tree.excluding("out/*")
    part = jp.scores.magnitude(ATTENTION, prunable=rule)
    told = "of 'key/kernel', 'query/kernel', but one of the two is left out"
    for options in ({"pattern": "2:4"}, {"sparsity": 0.5, "allocation": "matrix"}):
        with pytest.raises(ValueError, match=told):
            jp.masks.make(part, **options)
    with pytest.raises(ValueError, match=told):
        jp.gradual(
            optax.sgd(0.1), {1: "2:4"}, criterion=jp.scores.magnitude, prunable=rule
        ).init(ATTENTION)
    axes = jp.Axes(inputs=0, outputs=[1, 2])
    own = jp.masks.make(part, pattern="2:4", axes={"*": axes})["query"]["kernel"]
    whole = jp.masks.make(jp.scores.magnitude(ATTENTION), pattern="2:4")
    np.testing.assert_array_equal(own, whole["query"]["kernel"])
    by_leaf = jp.masks.make(part, 0.5, allocation="layer")
    assert by_leaf["key"]["kernel"].sum() == 32


def test_axes_are_integers():
    assert jp.Axes(-1, [-2]) == jp.Axes((-1,), (-2,))
    with pytest.raises(TypeError, match=r"Axes needs an integer inputs, got 0.0"):
        jp.Axes((0.0,), (1,))


def weight(name, matrix, mean_square):
    return Weight(
        name, name, (), (1, *matrix.shape), lambda x: x[None], lambda: matrix[None],
        mean_square,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["Block_{}/Dense_0", "Encoder_0/Block_{}/Dense_0", "Block_{}/experts/0"]
)
def test_owl_finds_the_number_of_a_layer(name):
    flat = jnp.ones((8, 8))
    weights = [
        weight(name.format(n), flat.at[0, :many].set(100), jnp.ones((1, 8)))
        for n, many in enumerate((0, 1, 4))
    ]
    found = jp.allocation.OWL().sparsities(weights, 0.6)
    assert found[0] > found[1] > found[2]


def test_no_weight_loses_more_than_it_has():
    flat = jnp.ones((3, 3))
    weights = [
        weight(f"Block_{n}", leaf, jnp.ones((1, 3)))
        for n, leaf in enumerate((flat.at[0, 0].set(99), flat, flat.at[0, 0].set(99)))
    ]
    found = jp.allocation.OWL().sparsities(weights, 0.95)
    assert max(found) == 1
    assert sum(found) * 9 == round(0.95 * 27)


def test_ranked_refuses_the_scores_of_a_model_of_another_size():
    ranked = jp.allocation.Ranked(scores(a=(2, 2), b=(2, 2)))
    with pytest.raises(ValueError, match="shapes, but those of 'a', 'b' have others"):
        jp.masks.make(scores(a=(4, 4), b=(4, 4)), 0.5, allocation=ranked)


def test_packed_masks_say_how_to_unpack_them():
    masks = jp.masks.make(scores(a=(4, 4)), 0.5)
    with pytest.raises(
        TypeError, match=r"'a' are packed; unpack them with jp.masks.un"
    ):
        jp.masks.apply(scores(a=(4, 4)), jp.masks.pack(masks))


def test_channels_without_inputs_are_none_to_remove():
    made = jp.masks.make(
        scores(a=(0, 4), w=(4, 4)), 0.5, allocation="global", pattern="channel"
    )
    assert made["a"].shape == (0, 4)
    assert made["w"].any(0).sum() == 2


def test_equal_means_of_float64_tie():
    with jax.enable_x64(True):
        own = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0, 1e9]])}
        made = jp.masks.make(own, 0.5, allocation="global", pattern="channel")
    assert made["a"].tolist() == [[True, False]]
    assert made["b"].tolist() == [[False, True]]


def test_magnitude_reads_lazy_leaves():
    values = np.array([[1.0, -2.0], [3.0, -4.0]], np.float32)
    lazy = {"w": jp.LazyArray(values.shape, values.dtype, lambda: values)}
    assert jp.scores.magnitude(lazy)["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_only_zeros_are_counted_as_zeros():
    """Not subnormal numbers, nor what needs the 64 bits of NumPy's arrays."""
    single = jnp.array([1e-40, 0.0, 1.0, -0.0, float("nan")])
    assert jp.sparsity({"w": single}).zeros == 2
    assert jp.sparsity({"w": single.astype(jnp.bfloat16)}).zeros == 2
    assert jp.sparsity({"w": np.array([2**32, 0, 1])}).zeros == 1
    assert jp.sparsity({"w": np.array([1e-50, 0.0, 1.0])}).zeros == 1


@pytest.mark.parametrize(
    ("values", "dtype", "threshold", "kept"),
    [
        ([1.0, 0.99], "bfloat16", 0.999, [True, False]),
        ([1e-40, 0.0, 1.0], "float32", 0.0, [True, False, True]),
        ([float("inf"), 1.0], "float16", 1e5, [True, False]),
    ],
)
def test_a_threshold_is_not_rounded_to_the_scores(values, dtype, threshold, kept):
    above = jp.masks.above({"w": jnp.array(values, dtype)}, threshold)
    assert above["w"].tolist() == kept


def test_parameters_in_host_memory_stay_there():
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    host = jax.sharding.NamedSharding(mesh, spec, memory_kind="pinned_host")
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    own = {"w": jnp.abs(values)}
    masks, plain = jp.masks.make(own, 0.5), jp.prune({"w": values}, own, 0.5)["w"]
    held = {"w": jax.device_put(values, host)}
    for pruned in (jp.masks.apply(held, masks), jp.prune(held, own, 0.5)):
        assert pruned["w"].sharding.memory_kind == "pinned_host"
        np.testing.assert_array_equal(pruned["w"], plain)


@pytest.mark.parametrize(
    "axes", [(-2, -1), {"w": (-2, -1)}, "w", lambda name: jp.Axes()]
)
def test_axes_of_another_kind_are_refused(axes):
    with pytest.raises(TypeError, match=r"axes must be jp\.Axes\(inputs"):
        jp.masks.make(scores(w=(4, 4)), pattern="2:4", axes=axes)


def test_shares_of_no_leaf_are_refused():
    for options in ({"sparsity": {}}, {"allocation": {}}):
        with pytest.raises(ValueError, match=r"name one leaf at least, but \{\} was"):
            jp.masks.make(scores(w=(4, 4)), **options)


def test_a_global_ranking_that_leaves_nothing_warns():
    with pytest.warns(UserWarning, match="leaves nothing of all leaves together"):
        jp.masks.make(scores(w=(3,)), 0.9, allocation="global")


def test_lazy_leaves_are_masked_and_pruned():
    values = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    lazy = {"w": jp.LazyArray(values.shape, values.dtype, lambda: jnp.array(values))}
    own = jp.scores.magnitude(lazy)
    expected = jp.prune({"w": values}, own, 0.5)["w"]
    for pruned in (
        jp.prune(lazy, own, 0.5),
        jp.prune(lazy, own, 0.5, donate=True),
        jp.masks.apply(lazy, jp.masks.make(own, 0.5)),
    ):
        np.testing.assert_array_equal(pruned["w"], expected)


def test_packed_masks_are_to_be_unpacked_where_zeros_are_counted():
    own = scores(w=(4, 4))
    with pytest.raises(TypeError, match=r"'w' are packed; unpack them with jp\.masks"):
        jp.sparsity(own, jp.masks.pack(jp.masks.make(own, 0.5)))


def test_a_name_with_brackets_is_named_as_it_is():
    params = {"layers[0]": scores(w=(8, 4))["w"]}
    traced = jp.trace(lambda p, x: x @ p["layers[0]"], params, jnp.ones((2, 8)))
    made = jp.masks.make(params, pattern="2:4", axes=traced.axes())
    assert jp.sparsity(made).total == 0.5
    assert jp.sparsity(jp.masks.make(params, {"layers[0]": 0.25})).total == 0.25
    rule = jp.tree.excluding("layers[0]")
    assert not rule("layers[0]", params["layers[0]"])


def test_a_leaf_that_one_ranking_empties_is_named():
    scores = {"small": jnp.arange(8.0), "large": 10 + jnp.arange(24.0)}
    with pytest.warns(UserWarning, match=r"nothing of 'small'; rank each by itself"):
        masks = jp.masks.make(scores, 0.5)
    assert not masks["small"].any()
    with pytest.warns(UserWarning, match=r"nothing of 'small'; rank each by itself"):
        jp.prune(scores, scores, 0.25)  # to the last weight of it
    with pytest.warns(UserWarning, match="of all leaves together") as warned:
        jp.masks.make({"a": jnp.ones(1), "b": jnp.zeros(0)}, 0.9)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jp.masks.make(scores, 0.2)["small"].sum() == 2
