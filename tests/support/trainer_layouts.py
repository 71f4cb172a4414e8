"""Parameters as other people's trainers keep them: small decoders in four layouts.

MaxText (Flax Linen) stacks layers on axis 1, Tunix and bonsai (Flax NNX) have einsums
over heads, Tunix keys and values in one leaf, Levanter (Equinox, Haliax) named arrays
that have their outputs first. Names, axes and einsums are theirs, as of 2026 (MaxText
`layers/attentions.py`, Tunix `models/gemma3/model.py`, Levanter `models/llama.py`,
bonsai `models/qwen3/modeling.py`); the code is not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import Axes
from tests.support.small_models import filled

VOCAB, WIDTH, HEADS, KEYS, SIZE, NEURONS, LAYERS = 11, 8, 4, 2, 4, 12, 2
TOKENS = np.arange(10).reshape(2, 5) * 3 % VOCAB


class Layout(NamedTuple):
    """A decoder.

    Attributes:
      fn: parameters and tokens to logits.
      params: its parameters.
      axes: leaf name to its true axes, for every matrix that is to be pruned.
    """

    fn: Callable[[Any, Any], jax.Array]
    params: Any
    axes: dict[str, Axes]


def attend(q, k, v):
    """Causal attention of grouped queries with rotary places."""
    b, t, heads, size = q.shape
    q, k = _rotated(q), _rotated(k)
    q = q.reshape(b, t, k.shape[2], heads // k.shape[2], size)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * size**-0.5
    logits = jnp.where(np.tril(np.ones((1, 1, 1, t, t), bool)), logits, -1e9)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(logits), v)
    return mixed.reshape(b, t, heads, size)


def _rotated(x):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / 10 ** np.arange(half)[None]
    sin, cos = (f(angle)[None, :, None].astype(np.float32) for f in (np.sin, np.cos))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def normed(x, scale):
    """RMS norm."""
    mean = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * jnp.expand_dims(scale, range(x.ndim - 1))


# MaxText: Linen, `nn.scan` with `param_scan_axis=1`.


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return normed(x, self.param("scale", nn.initializers.ones, x.shape[-1:]))


class MaxTextAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.DenseGeneral, use_bias=False)
        q = dense((HEADS, SIZE), name="query")(x)
        k, v = (dense((KEYS, SIZE), name=name)(x) for name in ("key", "value"))
        return dense(WIDTH, axis=(-2, -1), name="out")(attend(q, k, v))


class MaxTextMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, use_bias=False)
        gate, up = (dense(NEURONS, name=name)(x) for name in ("wi_0", "wi_1"))
        return dense(WIDTH, name="wo")(jax.nn.silu(gate) * up)


class MaxTextLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        own = RMSNorm(name="pre_self_attention_layer_norm")(x)
        x = x + MaxTextAttention(name="self_attention")(own)
        own = RMSNorm(name="post_self_attention_layer_norm")(x)
        return x + MaxTextMlp(name="mlp")(own), None


class MaxTextDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(MaxTextLayer, prevent_cse=False),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, None)
        x = RMSNorm(name="decoder_norm")(x)
        return nn.Dense(VOCAB, use_bias=False, name="logits_dense")(x)


class MaxText(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="token_embedder")(tokens)
        return MaxTextDecoder(name="decoder")(x)


def maxtext() -> Layout:
    """Layers on axis 1 of each leaf; (embed, layers, heads, size) of a query."""
    model = MaxText()
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    inside = "params/decoder/layers/"
    axes = {
        f"{inside}self_attention/{name}/kernel": Axes((0,), (2, 3))
        for name in ("query", "key", "value")
    }
    axes[f"{inside}self_attention/out/kernel"] = Axes((0, 2), (3,))
    axes |= {
        f"{inside}mlp/{n}/kernel": Axes((0,), (2,)) for n in ("wi_0", "wi_1", "wo")
    }
    return Layout(model.apply, filled(shapes), axes)


# Tunix and bonsai: NNX, a list of layers.


class Einsum(nnx.Module):
    """`w` is the leaf of both."""

    def __init__(self, equation, shape):
        self.equation, self.w = equation, nnx.Param(jnp.ones(shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Scale(nnx.Module):
    def __init__(self, size):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        return normed(x, self.scale[...])


class Mlp(nnx.Module):
    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj, self.up_proj = linear(WIDTH, NEURONS), linear(WIDTH, NEURONS)
        self.down_proj = linear(NEURONS, WIDTH)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class TunixAttention(nnx.Module):
    def __init__(self):
        self.q_einsum = Einsum("BTD,NDH->BTNH", (HEADS, WIDTH, SIZE))
        self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, KEYS, WIDTH, SIZE))
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH))

    def __call__(self, x):
        k, v = self.kv_einsum(x)
        return self.attn_vec_einsum(attend(self.q_einsum(x), k, v))


class BonsaiAttention(nnx.Module):
    def __init__(self):
        self.q_proj = Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, SIZE))
        self.k_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KEYS, SIZE))
        self.v_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KEYS, SIZE))
        self.o_proj = Einsum("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH))

    def __call__(self, x):
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class NnxLayer(nnx.Module):
    def __init__(self, attention, rngs):
        self.pre_attention_norm, self.pre_ffw_norm = Scale(WIDTH), Scale(WIDTH)
        self.attn, self.mlp = attention(), Mlp(rngs)

    def __call__(self, x):
        x = x + self.attn(self.pre_attention_norm(x))
        return x + self.mlp(self.pre_ffw_norm(x))


class Embedder(nnx.Module):
    def __init__(self):
        self.input_embedding = nnx.Param(jnp.ones((VOCAB, WIDTH)))


class NnxDecoder(nnx.Module):
    """Tunix ties the head, bonsai has `lm_head`."""

    def __init__(self, attention, tied):
        rngs = nnx.Rngs(0)
        self.embedder = Embedder()
        self.layers = nnx.List([NnxLayer(attention, rngs) for _ in range(LAYERS)])
        self.final_norm = Scale(WIDTH)
        self.lm_head = None if tied else Einsum("BTD,DV->BTV", (WIDTH, VOCAB))

    def __call__(self, tokens):
        x = self.embedder.input_embedding[...][tokens]
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        if self.lm_head is not None:
            return self.lm_head(x)
        return x @ self.embedder.input_embedding[...].T


def _nnx(attention, tied: bool, own: dict[str, Axes]) -> Layout:
    graphdef, state = nnx.split(NnxDecoder(attention, tied))
    own |= {f"mlp/{n}_proj/kernel": Axes((0,), (1,)) for n in ("gate", "up", "down")}
    axes = {f"layers/{i}/{name}": a for i in range(LAYERS) for name, a in own.items()}
    return Layout(lambda s, x: nnx.merge(graphdef, s)(x), filled(state), axes)


def tunix() -> Layout:
    """Heads first; keys and values in one leaf (2, heads, embed, size)."""
    own = {
        "attn/q_einsum/w": Axes((1,), (0, 2)),
        "attn/kv_einsum/w": Axes((2,), (0, 1, 3)),
        "attn/attn_vec_einsum/w": Axes((0, 1), (2,)),
    }
    return _nnx(TunixAttention, True, own)


def bonsai() -> Layout:
    """The input first; a head of its own."""
    own = {f"attn/{n}_proj/w": Axes((0,), (1, 2)) for n in "qkv"}
    own["attn/o_proj/w"] = Axes((0, 1), (2,))
    return _nnx(BonsaiAttention, False, own)


# Levanter: Equinox, named arrays, outputs first, layers stacked on axis 0.


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Named:
    """An array whose axes have names; registered without keys, as Haliax's is."""

    array: jax.Array
    axes: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)


class NamedLinear(eqx.Module):
    weight: Named
    outputs: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x, names):
        """x has the axes `names`; the outputs come in the place of the inputs."""
        letters = {name: chr(97 + i) for i, name in enumerate((*names, *self.outputs))}
        kept = [name for name in names if name not in self.weight.axes]
        spelled = [
            "".join(letters[name] for name in axes)
            for axes in (names, self.weight.axes, (*kept, *self.outputs))
        ]
        return jnp.einsum(
            f"{spelled[0]},{spelled[1]}->{spelled[2]}", x, self.weight.array
        )


def named(outputs, inputs):
    """A linear layer of all layers, (layer, outputs, inputs)."""
    sizes = {
        "embed": WIDTH, "mlp": NEURONS, "kv_head": KEYS, "head_size": SIZE,
        "q_heads_per_group": HEADS // KEYS,
    }  # fmt: skip
    shape = (LAYERS, *(sizes[name] for name in (*outputs, *inputs)))
    return NamedLinear(Named(jnp.ones(shape), (*outputs, *inputs)), outputs)


_QUERIES = ("kv_head", "q_heads_per_group", "head_size")
_KEYS = ("kv_head", "head_size")


class LevanterAttention(eqx.Module):
    q_proj: NamedLinear
    k_proj: NamedLinear
    v_proj: NamedLinear
    o_proj: NamedLinear

    def __call__(self, x):
        names = ("batch", "position", "embed")
        q, k, v = (p(x, names) for p in (self.q_proj, self.k_proj, self.v_proj))
        b, t = x.shape[:2]
        mixed = attend(q.reshape(b, t, HEADS, SIZE), k, v)
        mixed = mixed.reshape(b, t, KEYS, HEADS // KEYS, SIZE)
        return self.o_proj(mixed, ("batch", "position", *_QUERIES))


class LevanterMlp(eqx.Module):
    gate_proj: NamedLinear
    up_proj: NamedLinear
    down_proj: NamedLinear

    def __call__(self, x):
        names = ("batch", "position", "embed")
        inside = jax.nn.silu(self.gate_proj(x, names)) * self.up_proj(x, names)
        return self.down_proj(inside, ("batch", "position", "mlp"))


class LevanterLayer(eqx.Module):
    self_attn: LevanterAttention
    mlp: LevanterMlp
    input_layernorm: Named
    post_attention_layernorm: Named

    def __call__(self, x):
        x = x + self.self_attn(normed(x, self.input_layernorm.array))
        return x + self.mlp(normed(x, self.post_attention_layernorm.array))


class Levanter(eqx.Module):
    layers: LevanterLayer
    embeddings: dict[str, Named]

    def __call__(self, tokens):
        table = self.embeddings["token_embeddings"].array
        fold = jax.checkpoint(lambda x, layer: (layer(x), None))
        x, _ = jax.lax.scan(fold, table[tokens], self.layers)
        return x @ table.T


def levanter() -> Layout:
    """Outputs before inputs, behind the layers; names are no part of the tree."""
    embed = ("embed",)
    scale = Named(jnp.ones((LAYERS, WIDTH)), embed)
    attention = LevanterAttention(
        named(_QUERIES, embed), named(_KEYS, embed), named(_KEYS, embed),
        named(embed, _QUERIES),
    )  # fmt: skip
    mlp = LevanterMlp(
        *(named(*p) for p in ((("mlp",), embed),) * 2), named(embed, ("mlp",))
    )
    layers = LevanterLayer(attention, mlp, scale, scale)
    table = Named(jnp.ones((VOCAB, WIDTH)), ("vocab", "embed"))
    model = Levanter(layers, {"token_embeddings": table})
    weights = {
        "self_attn/q_proj": Axes((4,), (1, 2, 3)),
        "self_attn/k_proj": Axes((3,), (1, 2)),
        "self_attn/v_proj": Axes((3,), (1, 2)),
        "self_attn/o_proj": Axes((2, 3, 4), (1,)),
        **{f"mlp/{name}_proj": Axes((2,), (1,)) for name in ("gate", "up", "down")},
    }
    axes = {f"layers/{name}/weight": own for name, own in weights.items()}
    return Layout(lambda params, x: params(x), filled(model), axes)


LAYOUTS = {"maxtext": maxtext, "tunix": tunix, "bonsai": bonsai, "levanter": levanter}
