"""Levanter's own scanned Llama is seen whole, and pruned along its true axes.

`pip install '.[levanter]'`; `tests/support/trainer_layouts.py` stands for it elsewhere.
"""

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import Axes

llama = pytest.importorskip("levanter.models.llama")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

import equinox as eqx  # noqa: E402
import haliax as hax  # noqa: E402

# Layers first, then outputs, then inputs; queries are (layers, keys, group, size, in).
AXES = {
    "self_attn/q_proj": Axes(inputs=(4,), outputs=(1, 2, 3)),
    "self_attn/k_proj": Axes(inputs=(3,), outputs=(1, 2)),
    "self_attn/v_proj": Axes(inputs=(3,), outputs=(1, 2)),
    "self_attn/o_proj": Axes(inputs=(2, 3), outputs=(1,)),
    "mlp/gate_proj": Axes(inputs=(2,), outputs=(1,)),
    "mlp/up_proj": Axes(inputs=(2,), outputs=(1,)),
    "mlp/down_proj": Axes(inputs=(2,), outputs=(1,)),
}


def test_scanned_layers_are_seen_and_pruned_alone():
    config = llama.LlamaConfig(
        seq_len=8,
        hidden_dim=16,
        intermediate_dim=32,
        num_layers=4,  # which 4 divides, so that a wrong axis would go unnoticed
        num_heads=4,
        num_kv_heads=2,
    )
    model = config.build(hax.Axis("vocab", 32), key=jax.random.PRNGKey(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = hax.Axis("batch", 2), config.Pos
    tokens = hax.random.randint(jax.random.key(1), batch, 0, 32)

    def logits(params, tokens):
        return eqx.combine(params, static)(tokens)

    with jax.numpy_rank_promotion("allow"):
        axes = jp.trace(logits, params, tokens).axes()
        result = jp.prune_trained(logits, params, [tokens], "magnitude", sparsity=0.5)
    stacked = "transformer/layers/stacked/{}/weight".format
    assert axes == {stacked(name): entry for name, entry in AXES.items()}
    zeros = jp.sparsity(result.params).by_leaf
    pruned = {name for name, (count, _) in zeros.items() if count}
    assert pruned == axes.keys()
    for name in pruned:
        count, size = zeros[name]
        assert count == size / 2
    masks = jp.masks.make(jp.scores.magnitude(params), pattern="2:4", axes=axes)
    up = np.asarray(jp.tree.named_leaves(masks)[stacked("mlp/up_proj")])
    assert (up.reshape(4, 32, 4, 4).sum(-1) == 2).all()
