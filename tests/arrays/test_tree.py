"""Which leaves are pruned and why not the others, and how many weights are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp


def ones(*shape):
    return jnp.asarray(np.ones(shape, np.float32))  # by NumPy: nothing is compiled


PARAMS = {
    "blocks": [{"kernel": ones(4, 8), "bias": ones(8)}],
    "head": {"kernel": ones(8, 2)},
    "ln_f": {"scale": ones(2, 4)},
    "steps": jnp.asarray(np.zeros((2, 2), np.int32)),
    "temperature": ones(),
    "wte": {"embedding": ones(5, 4)},
}
WHY = {
    "blocks/0/bias": "one axis",
    "blocks/0/kernel": "",
    "head/kernel": "named as an output head",
    "ln_f/scale": "named as a normalisation",
    "steps": "not floating",
    "temperature": "no axes",
    "wte/embedding": "named as an embedding",
}


def test_each_leaf_is_explained_and_can_be_read():
    rows = jp.tree.explain(PARAMS)
    assert {row.name: row.why for row in rows} == WHY
    assert [row.pruned for row in rows] == [not why for why in WHY.values()]
    assert rows[1].shape == (4, 8)


def test_the_explanation_prints_as_a_table():
    lines = str(jp.tree.explain(PARAMS)).splitlines()
    assert lines[0] == "blocks/0/bias    (8,)    one axis"
    assert lines[1] == "blocks/0/kernel  (4, 8)  may be pruned"
    assert lines[-1] == "32 of 89 weights may be pruned"


def test_a_bias_of_two_axes_is_named_as_one():
    [row] = jp.tree.explain({"attention": {"bias": jnp.ones((4, 4))}})
    assert row.why == "named as a bias"


# ConvNeXt of transformers and Flax, timm, MobileNet of Flax, Keras; and no such ones.
DEPTHWISE = [
    "stages/0/dwconv/kernel", "blocks/conv_dw/weight", "block1/depthwise/kernel",
    "depthwise_conv2d_3/kernel", "Block_0/DepthwiseConv_0/kernel", "dw_conv1/kernel",
]  # fmt: skip
CONVOLUTIONS = ["conv/kernel", "stages/0/pwconv1/kernel", "depthwiser/kernel", "dw/up"]


@pytest.mark.parametrize("name", DEPTHWISE + CONVOLUTIONS)
def test_depthwise_convolutions_are_left_dense_where_they_are_named_so(name):
    why = "named as a depthwise convolution" if name in DEPTHWISE else ""
    [row] = jp.tree.explain({name: ones(7, 7, 1, 8)})
    assert row.why == why


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        (
            "mixer/conv1d/kernel",
            (4, 1, 96),
            "one input and few taps",
        ),  # bonsai's Mamba 2
        (
            "layers.0.mixer.conv1d.weight",
            (96, 1, 4),
            "one input and few taps",
        ),  # torch's
        ("conv1d/kernel", (4, 12, 1, 96), "one input and few taps"),  # stacked layers
        ("conv1d/kernel", (3, 16, 32), ""),  # joins its inputs
        ("conv1d/kernel", (512, 1, 64), ""),  # of a wave form
        ("conv1/kernel", (3, 3, 1, 32), ""),  # of gray pictures
    ],
)
def test_kernels_of_a_few_taps_over_time_are_left_dense(name, shape, why):
    [row] = jp.tree.explain({name: ones(*shape)})
    assert row.why == why


def test_names_of_torch_speak_as_those_of_a_tree():
    names = {
        "bert.embeddings.word_embeddings.weight": "named as an embedding",
        "lm_head.weight": "named as an output head",
        "layers.0.mlp.up_proj.weight": "",
        "encoder.layer.0.output.dense.weight": "",
        "stages.0.blocks.1.conv_dw.weight": "named as a depthwise convolution",
    }
    rows = jp.tree.explain({name: ones(4, 4) for name in names})
    assert {row.name: row.why for row in rows} == names


def test_the_explanation_names_the_glob_that_excludes():
    rule = jp.tree.excluding("head/*", "blocks/0/*")
    rows = {row.name: row for row in jp.tree.explain(PARAMS, prunable=rule)}
    assert rows["blocks/0/kernel"].why == "excluded by 'blocks/0/*'"
    assert not rows["blocks/0/kernel"].pruned
    assert rule == jp.tree.excluding("head/*", "blocks/0/*")


def test_a_rule_of_ones_own_is_named_where_no_other_reason_is():
    rows = jp.tree.explain(PARAMS, prunable=lambda name, leaf: name == "head/kernel")
    assert [row.name for row in rows if row.pruned] == ["head/kernel"]
    why = {row.name: row.why for row in rows}
    assert why["blocks/0/kernel"] == "excluded by the rule prunable="


def test_shapes_are_enough_to_explain():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert jp.tree.explain(shapes) == jp.tree.explain(PARAMS)


@pytest.mark.parametrize("excluded", [optax.MaskedNode(), None, True])
def test_sparsity_with_masks_counts_only_leaves_that_have_one(excluded):
    params = {"a": jnp.array([0.0, 1.0, 2.0, 0.0]), "b": jnp.zeros(7)}
    masks = {"a": jnp.array([False, True, True, False]), "b": excluded}
    report = jp.sparsity(params, masks)
    assert report.by_leaf == {"a": (2, 4)}
    assert report.total == 0.5
    with pytest.raises(ValueError, match="lack 'b'"):
        jp.sparsity(params, {"a": masks["a"]})


def test_sparsity_reads_lazy_arrays():
    host = np.array([0.0, 1.0], np.float32)
    leaf = jp.LazyArray(host.shape, host.dtype, lambda: jnp.asarray(host))
    assert jp.sparsity({"a": leaf}).total == 0.5
