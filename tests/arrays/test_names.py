"""How leaves are called, which of them may be pruned, and what counts as a zero."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.support.trajectories import same_bits

ONES = jnp.asarray(np.ones((4, 4), np.float32))


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_an_attribute_called_value_is_part_of_the_name():
    params = {"attn": Attention(ONES, ONES, ONES)}
    assert jp.tree.names(params) == ["attn/query", "attn/key", "attn/value"]
    rule = jp.tree.excluding("attn/value")
    scores = jp.scores.magnitude(params, prunable=rule)
    assert isinstance(scores["attn"].value, optax.MaskedNode)
    masks = {"attn": Attention(np.ones((4, 4), bool), np.zeros((4, 4), bool), None)}
    assert jp.sparsity(jp.masks.apply(params, masks)).by_leaf["attn/value"] == (0, 16)


def test_what_nnx_wraps_is_called_as_what_it_wraps():
    state = nnx.State({"a": {"value": nnx.Param(ONES)}, "b": nnx.Param([ONES, ONES])})
    assert jp.tree.names(state) == ["a/value", "b/0", "b/1"]
    assert jp.tree.names(nnx.as_pure(state)) == jp.tree.names(state)
    masks = jp.masks.make(jp.scores.magnitude(state), 0.5, allocation="layer")
    pruned = jp.prune(
        nnx.as_pure(state), jp.scores.magnitude(state), 0.5, allocation="layer"
    )
    assert same_bits(jp.masks.apply(nnx.as_pure(state), masks), pruned)


def test_what_linen_boxes_is_called_as_what_is_in_the_box():
    box = nn.Partitioned(ONES, ("inputs", "outputs"))
    params = {"up": {"kernel": box}, "lm_head": {"kernel": box}}
    assert jp.tree.names(params) == jp.tree.names(nn.unbox(params))
    pruned = [row.name for row in jp.tree.explain(params) if row.pruned]
    assert pruned == ["up/kernel"]


@jax.tree_util.register_pytree_node_class
class Wrapped:
    """One array, registered without keys as Haliax's is."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Pair(Wrapped):
    """Two arrays without keys, of which JAX counts the second as the second."""

    def tree_flatten(self):
        return (self.array, None), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])


def test_what_wraps_one_array_without_a_key_is_no_part_of_its_name():
    params = {
        "embeddings": {"weight": Wrapped(ONES)},
        "ln": {"weight": Wrapped(ONES)},
        "mlp": [Wrapped(ONES), Pair(ONES)],
    }
    bare = ["embeddings/weight", "ln/weight", "mlp/0", "mlp/1/0"]
    assert jp.tree.names(params) == bare
    pruned = [row.name for row in jp.tree.explain(params) if row.pruned]
    assert pruned == ["mlp/0", "mlp/1/0"]
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5, allocation="layer")
    assert jp.tree.names(masks) == bare
    assert isinstance(masks["ln"]["weight"].array, optax.MaskedNode)
    unwrapped = {"mlp": [ONES, Pair(ONES)], "ln": {"weight": ONES}}
    unwrapped["embeddings"] = {"weight": ONES}
    assert jp.tree.names(unwrapped) == bare
    pruned_leaves = jp.sparsity(jp.masks.apply(unwrapped, masks)).by_leaf
    assert pruned_leaves["mlp/0"] == (8, 16)
    assert pruned_leaves["embeddings/weight"] == (0, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """An array as Penzai has it."""

    data_array: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabeledVariableValue:
    """A variable as Penzai's `unbind_params(model, freeze=True)` gives it."""

    value: NamedArray
    label: str = dataclasses.field(metadata={"static": True})


LabeledVariableValue.__module__ = "penzai.core.variables"


def test_the_label_of_a_variable_of_penzai_is_its_name():
    labels = ["model/embedder.embeddings", "model/block_0/mlp.weights"]
    params = [LabeledVariableValue(NamedArray(ONES), label) for label in labels]
    bare = ["model/embedder/embeddings", "model/block_0/mlp/weights"]
    assert jp.tree.names({"g": params}) == [f"g/{name}" for name in bare]
    packed = jp.masks.pack(jp.masks.make(jp.scores.magnitude(params), 0.5))
    assert jp.tree.names(packed) == [bare[0], f"{bare[1]}/bits"]
    tx = jp.gradual(optax.adam(0.1), {0: 0.5}, criterion="magnitude", packed=True)
    _, state = tx.update(params, tx.init(params), params)
    assert jp.sparsity(jp.masks.get(state, params)).by_leaf == {bare[1]: (8, 16)}


def test_wrapped_arrays_in_a_state_are_found_as_the_parameters_are():
    params = {"w": Wrapped(ONES), "b": {"x": Wrapped(ONES)}}
    tx = jp.gradual(optax.adam(0.1), {0: 0.5}, criterion="magnitude", packed=True)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert jp.sparsity(jp.masks.get(state, params)).by_leaf.keys() == {"w", "b/x"}


@pytest.mark.parametrize(
    "call",
    [
        jp.tree.names,
        jp.sparsity,
        jp.scores.magnitude,
        jp.tree.explain,
        lambda params: jp.masks.apply(params, params),
        lambda params: jp.keep_masks(optax.sgd(0.1), params).init(params),
        lambda params: jp.masks.make(params, 0.5),
    ],
)
def test_two_leaves_of_one_name_are_refused(call):
    params = {"a/b": ONES, "a": {"b": ONES}}
    with pytest.raises(ValueError, match=r"two are called 'a/b'; rename one"):
        call(params)


@pytest.mark.parametrize(
    "use",
    [
        lambda params, rule: jp.scores.magnitude(params, prunable=rule),
        lambda params, rule: jp.tree.explain(params, prunable=rule),
        lambda params, rule: jp.contrib.lora(optax.sgd(0.1), 2, targets=rule).init(
            params
        ),
    ],
)
def test_a_glob_that_excludes_nothing_is_told_with_names_near_it(use):
    params = {"attn": {"value": ONES, "query": ONES}, "mlp": {"up": ONES}}
    rule = jp.tree.excluding("mlp/*", "atn/value")
    words = r"excluding\('atn/value'\) must match a leaf.*near it are 'attn/value'"
    with pytest.raises(ValueError, match=words):
        use(params, rule)
    use(params, jp.tree.excluding("mlp/*", "attn/value"))


def prunes(names):
    return {name: jp.tree.prunable(name, ONES) for name in names.split()}


def test_whole_words_say_what_is_left_alone():
    innocent = prunes(
        """
        embedder/enc/dense/kernel text_embedding_model/layers/0/kernel
        denormalizer/kernel normformer/mlp/kernel head/mlp/kernel
        multi_head/kernel mlp/gate/kernel model/layers/0/mlp/gate_proj/weight
        biased/kernel bias_proj/kernel overhead/kernel blocks/0/kernel
        block_0/output_layer/kernel blocks/0/mlp/output_layer/kernel
        """
    )
    assert all(innocent.values()), innocent


def test_embeddings_norms_and_heads_are_left_alone_in_every_spelling():
    left = prunes(
        """
        wte/embedding transformer/wpe/weight Embed_0/embedding
        model/embed_tokens/weight gpt_neox/embed_in/weight embed_out/weight
        bert/embeddings/word_embeddings/weight
        vit/embeddings/patch_embeddings/projection/weight pos_embed
        shared/weight LayerNorm_0/scale model/layers/0/input_layernorm/weight
        post_attention_norm/weight ln_f/scale ln1/kernel batch_norm1/kernel
        RMSNorm_3/weight SelfAttention/relative_attention_bias/weight
        attn/relative_position_bias_table lm_head/weight output/weight
        transformer/output_layer/weight head/kernel classifier/weight
        score/weight mlp/output_layer/kernel output_layer/kernel
        value_head/kernel LMHead/kernel LMHead_0/kernel Classifier_0/kernel
        blocks/QKNorm/kernel cls_token encoder/register_tokens
        lm_head/base_layer/weight classifier/modules_to_save/default/weight
        score/original_module/weight
        """
    )
    assert not any(left.values()), left


def test_routers_and_decays_are_left_alone():
    """Of mixtures of experts and state spaces, as Hugging Face names them."""
    left = prunes(
        """
        model/layers/0/block_sparse_moe/gate/weight
        model/layers/0/mlp/gate/weight
        model/layers/0/mlp/shared_expert_gate/weight
        model/layers/0/mlp/router/weight
        model/layers/0/feed_forward/router/weight
        model/layers/0/block_sparse_moe/router/layer/weight
        model/layers/0/mlp/gate/wg/weight moe/gate/kernel
        Block_1/Router_0/kernel backbone/layers/0/mixer/A_log
        """
    )
    assert not any(left.values()), left
    experts = prunes(
        """
        model/layers/0/block_sparse_moe/experts/0/w1/weight
        model/layers/0/mlp/experts/gate_up_proj
        model/layers/0/mlp/shared_expert/up_proj/weight
        backbone/layers/0/mixer/in_proj/weight
        """
    )
    assert all(experts.values()), experts


@pytest.mark.full
def test_codes_count_as_the_numbers_they_stand_for():
    weights = {"w": np.arange(64.0).reshape(8, 8) - 30, "b": np.arange(3.0)}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    for tx, signed in (
        (jp.track_importance(storage="int8"), True),
        (jp.track_gradients(storage="int8"), False),
    ):
        nothing = jax.tree.map(np.zeros_like, weights)
        _, state = jax.jit(tx.update)(weights, jax.jit(tx.init)(weights), nothing)
        held = jp.get_importance(state)
        report = jp.sparsity(held.weight if signed else held.square)
        assert report.by_leaf == {"b": (1, 3), "w": (1, 64)}


def test_packed_masks_count_as_their_masks():
    masks = {"w": np.arange(35).reshape(5, 7) % 3 == 0, "s": np.asarray(True)}
    masks = jax.tree.map(jnp.asarray, masks)
    packed = jp.masks.pack(masks)
    assert jp.sparsity(packed).by_leaf == jp.sparsity(masks).by_leaf
    assert jp.sparsity(packed).by_leaf == {"s": (0, 1), "w": (23, 35)}


def test_random_keys_are_no_weights():
    class Model(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    report = jp.sparsity(nnx.state(Model()))
    assert report.by_leaf["linear/bias"] == (4, 4)
    keys = {"key": jax.random.key(0), "w": np.zeros(3)}
    assert jp.sparsity(keys).by_leaf == {"w": (3, 3)}
