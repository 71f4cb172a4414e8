"""Names of what Haliax, Penzai and Keras make themselves, where they are installed.

`pip install '.[clients]'`; the layouts of `tests/support/trainer_layouts.py` and the
wrappers of `test_names.py` stand for them elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

# Warnings of their own are no matter of ours.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


def pruned_and_trained(params):
    """Masks that a packed schedule has chosen after three steps, by name."""
    tx = jp.gradual(optax.adam(1e-3), {1: 0.5}, packed=True)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    masks = jp.tree.named_leaves(jp.masks.get(state, params))
    report = jp.sparsity(params).by_leaf
    for name, mask in masks.items():
        if not jp.tree.is_excluded(mask):
            assert report[name] == (mask.size - np.count_nonzero(mask), mask.size)
    return masks


def test_haliax():
    haliax = pytest.importorskip("haliax")
    embed, vocab, layers = haliax.make_axes(embed=8, vocab=16, layers=4)
    numbers = np.random.default_rng(0).normal

    def weight(*axes):
        sizes = [axis.size for axis in axes]
        return {"weight": haliax.named(numbers(size=sizes).astype("f"), axes)}

    params = {
        "embeddings": {"token_embeddings": weight(vocab, embed)["weight"]},
        "layers": {
            "input_layernorm": weight(layers, embed),
            "mlp": {"up_proj": weight(layers, vocab, embed)},
        },
        "lm_head": weight(embed, vocab),
    }
    rows = {row.name: row.pruned for row in jp.tree.explain(params)}
    assert rows == {
        "embeddings/token_embeddings": False,
        "layers/input_layernorm/weight": False,
        "layers/mlp/up_proj/weight": True,
        "lm_head/weight": False,
    }
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
    assert jp.tree.names(masks) == jp.tree.names(params)
    assert pruned_and_trained(params).keys() == rows.keys()
    small = jp.tree.excluding("layers/mlp/*/weight")
    assert not any(row.pruned for row in jp.tree.explain(params, prunable=small))


def test_penzai():
    pytest.importorskip("penzai")
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=4,
        mlp_hidden_dim=32,
        num_decoder_blocks=1,
        vocab_size=32,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        rope_wavelength=1e4,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    model = llamalike.build_llamalike_transformer(
        config, init_base_rng=jax.random.key(0)
    )
    _, params = pz.unbind_params(model, freeze=True)
    pruned = [row.name for row in jp.tree.explain(params) if row.pruned]
    assert pruned == [
        f"transformer/block_0/{name}/weights"
        for name in (
            *(f"attention/{part}" for part in ("query", "key", "value", "output")),
            *(f"mlp/{part}_linear" for part in ("gating", "value", "out")),
        )
    ]
    masks = pruned_and_trained(params)
    assert [k for k, m in masks.items() if not jp.tree.is_excluded(m)] == pruned


def test_keras():
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(16, 8, name="embedding"),
            keras.layers.Dense(16, name="up"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(16, name="lm_head"),
        ],
        name="net",  # else numbered by how many there were
    )
    params = {v.path: v.value for v in model.trainable_variables}
    pruned = [row.name for row in jp.tree.explain(params) if row.pruned]
    assert pruned == ["net/up/kernel"]


def test_depthwise_kernels_of_mobilenet_are_left_dense():
    keras = pytest.importorskip("keras")
    net = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None)
    params = {v.path: v.value for v in net.trainable_variables}
    rows = jp.tree.explain(params)
    depthwise = {
        layer.kernel.path
        for layer in net.layers
        if isinstance(layer, keras.layers.DepthwiseConv2D)
    }
    assert len(depthwise) == 13
    why = "named as a depthwise convolution"
    assert {row.name for row in rows if row.why == why} == depthwise
    assert sum(row.pruned for row in rows) == 15  # first, 13 that join channels, head
