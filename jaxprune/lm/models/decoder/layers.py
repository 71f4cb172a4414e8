"""The layers of a `Decoder`: norms, attention and MLP.

Norms, rotary positions, scores and softmax are float32, products run in
`DecoderConfig.dtype`. A layer holds parameters and settings, nothing else. Axes are
called batch, time (the tokens that come in), keys (the tokens that may be attended to:
those of the KV cache too), heads, kv_heads and dim.

References:
  Zhang, Sennrich: Root Mean Square Layer Normalization, 2019, arXiv 1910.07467.
  Ainslie et al.: GQA, 2023, arXiv 2305.13245. Shazeer: GLU Variants Improve
  Transformer, 2020, arXiv 2002.05202.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxprune.lm.models.decoder.config import DecoderConfig, Norms
from jaxprune.lm.models.decoder.rope import rotate
from jaxprune.lm.models.placement import broadcast, row_sharding
from jaxprune.lm.models.product import product

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""The nonlinearities of an MLP by their names in `DecoderConfig`."""
CosSin = tuple[Float[Array, "time pairs"], Float[Array, "time pairs"]]
"""Cosines and sines of the rotary angles, `rope.cos_and_sin`."""
KVCache = tuple[
    Float[Array, "batch keys kv_heads dim"], Float[Array, "batch keys kv_heads dim"]
]
"""Keys and values of one layer."""


class Numeric(Protocol):
    """What norms and products need to know of a model."""

    @property
    def norm(self) -> Norms:
        """The kind of its norms."""

    @property
    def norm_epsilon(self) -> float:
        """What is added to the variance."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of its products."""


class Norm(nnx.Module):
    """Normalises the last axis by its root mean square, or by mean and deviation.

    x / sqrt(mean(x^2) + epsilon) times a scale; "rms_plus_one" holds the scale less 1,
    "layer" subtracts the mean before and adds a bias after, "layer_scale" adds none and
    "layer_plain" has no scale either. "rms" rounds to the type of x before it scales.
    """

    def __init__(self, config: Numeric, *shape: int):
        """Makes a scale of this shape, 1 at the beginning, and the bias."""
        self.norm, self.epsilon = config.norm, config.norm_epsilon
        # A checkpoint of Gemma stores the scale less 1.
        initial = 0.0 if self.norm == "rms_plus_one" else 1.0
        scale = jnp.full(shape, initial, jnp.float32)
        self.scale = None if self.norm == "layer_plain" else nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros(shape)) if self.norm == "layer" else None

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalises in float32."""
        y = x.astype(jnp.float32)  # (..., width)
        if self.norm.startswith("layer"):
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)  # (..., 1)
        y = y * jax.lax.rsqrt(variance + self.epsilon)
        if self.scale is None:
            return y.astype(x.dtype)
        scale = broadcast(self.scale[...], x)  # (1, ..., 1, width)
        if self.norm == "rms":
            # Llama and its relatives round before they scale, Gemma after.
            return y.astype(x.dtype) * scale.astype(x.dtype)
        scale = scale.astype(jnp.float32)
        y = y * (1 + scale if self.norm == "rms_plus_one" else scale)
        if self.bias is not None:
            y = y + broadcast(self.bias[...], x).astype(jnp.float32)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel + bias, [in, out], normal with deviation 0.02 at the beginning."""

    def __init__(
        self,
        config: Numeric,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        """Makes the kernel and the bias; `rngs` is read, not kept."""
        kernel = 0.02 * jax.random.normal(rngs.params(), (inputs, outputs))  # [in, out]
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None
        self.dtype = config.dtype

    def __call__(
        self,
        x: Float[Array, "... inputs"],
        *,
        dtype: str | None = None,
        outputs: Int[Array, "some"] | None = None,
    ) -> Float[Array, "... outputs"]:
        """The product in the compute dtype; the result is of `dtype` if given.

        Where `outputs` are given, of those alone.
        """
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        if outputs is not None:
            kernel = jnp.take(kernel, outputs, axis=1, mode="clip")
            bias = None if bias is None else jnp.take(bias, outputs, mode="clip")
        x = x.astype(self.dtype)
        y = product(  # (..., outputs)
            x,
            kernel.astype(self.dtype),
            preferred_element_type=dtype,
            out_sharding=row_sharding(x, x.ndim - 1),
        )
        return y if bias is None else y + broadcast(bias, y).astype(y.dtype)


class Attention(nnx.Module):
    """Causal self-attention; several query heads may share a key and a value head."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        self.heads, self.kv_heads = config.heads, config.kv_heads
        q_width, kv_width = (
            heads * config.head_dim for heads in (self.heads, self.kv_heads)
        )
        width, bias = config.width, config.qkv_bias
        if config.fused:
            fused_width = q_width + 2 * kv_width
            self.qkv = Linear(config, width, fused_width, bias=bias, rngs=rngs)
        else:
            self.q = Linear(config, width, q_width, bias=bias, rngs=rngs)
            self.k = Linear(config, width, kv_width, bias=bias, rngs=rngs)
            self.v = Linear(config, width, kv_width, bias=bias, rngs=rngs)
        self.out = Linear(config, q_width, width, bias=config.out_bias, rngs=rngs)
        self.norm_q = _norm_of_heads(config, self.heads)
        self.norm_k = _norm_of_heads(config, self.kv_heads)
        self.sinks = nnx.Param(jnp.zeros(self.heads)) if config.sinks else None
        scale = config.attention_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.softcap, self.qk_norm = config.attention_softcap, config.qk_norm
        self.fused, self.by_head = config.fused, config.fused_by_head
        rope = config.rope(layer)
        self.interleaved = rope is not None and rope.interleaved

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        cos_sin: CosSin | None,
        mask: Bool[Array, "time keys"],
        kv_cache: KVCache | None,
        cache_length: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], KVCache]:
        """Attends to the keys that the mask allows, those of the cache included.

        Args:
          x: normalised hidden states.
          cos_sin: cosines and sines of the tokens' positions; None turns nothing.
          mask: which keys each token may attend to.
          kv_cache: keys and values of this layer, with room for the new ones; None
            where the tokens are the whole text.
          cache_length: number of the cache's positions that are filled.

        Returns:
          What the residual stream gets, and keys and values with the new ones in them.
        """
        batch, time, _ = x.shape
        q, k, v = self._queries_keys_values(x)  # (batch, time, heads | kv_heads, dim)
        if cos_sin is not None:
            q, k = (rotate(y, cos_sin, interleaved=self.interleaved) for y in (q, k))
        if kv_cache is not None:  # (batch, keys, kv_heads, dim)
            index = (0, cache_length, 0, 0)
            k = jax.lax.dynamic_update_slice(kv_cache[0], k, index)
            v = jax.lax.dynamic_update_slice(kv_cache[1], v, index)
        sinks = None if self.sinks is None else self.sinks[...]  # (heads,)
        y = attend(q, k, v, mask, self.scale, self.softcap, sinks)
        return self.out(y.reshape(batch, time, -1)), (k, v)

    def _queries_keys_values(self, x: Array) -> list[Array]:
        """Each (batch, time, heads or kv_heads, dim), q and k normalised."""
        batch, time, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        if not self.fused:
            qkv = [self.q(x), self.k(x), self.v(x)]
        elif self.by_head:
            # Of each key head the queries that share it, its key, its value.
            group = heads // kv_heads
            fused = self.qkv(x).reshape(batch, time, kv_heads, group + 2, -1)
            qkv = jnp.split(fused, [group, group + 1], axis=-2)
        else:
            fused = self.qkv(x)  # (batch, time, (heads + 2 kv_heads) * dim)
            dim = fused.shape[-1] // (heads + 2 * kv_heads)
            qkv = jnp.split(fused, [heads * dim, (heads + kv_heads) * dim], axis=-1)
        # OLMo normalises queries over all heads at once, so before they are cut.
        whole = self.qk_norm == "whole"
        norms = (self.norm_q, self.norm_k, None)
        cut = []
        for y, norm, n in zip(qkv, norms, (heads, kv_heads, kv_heads), strict=True):
            y = apply_norm(norm, y) if whole else y
            y = y.reshape(batch, time, n, -1)
            cut.append(y if whole else apply_norm(norm, y))
        return cut


class MLP(nnx.Module):
    """Wider, a nonlinearity, and back."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, neurons: int | None = None
    ):
        """Makes the matrices; `neurons` is `config.mlp_width` where it is None."""
        width, bias = config.width, config.mlp_bias
        neurons = config.mlp_width if neurons is None else neurons
        self.activation = config.activation
        self.gated, self.fused = config.gated, config.gated and config.fused
        if self.fused:
            self.gate_up = Linear(config, width, 2 * neurons, bias=bias, rngs=rngs)
        else:
            self.up = Linear(config, width, neurons, bias=bias, rngs=rngs)
        if self.gated and not self.fused:
            self.gate = Linear(config, width, neurons, bias=bias, rngs=rngs)
        self.down = Linear(config, neurons, width, bias=bias, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """Applies the layer to each token by itself."""
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return self.down(act(self.up(x)))
        if self.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)  # (batch, time, neurons)
        return self.down(act(gate) * up)


def apply_norm(norm: Norm | None, x: Array) -> Array:
    """Normalised, where there is a norm."""
    return x if norm is None else norm(x)


def _norm_of_heads(config: DecoderConfig, heads: int) -> Norm | None:
    """The norm of queries or keys."""
    shapes = {  # of the scale
        "head": (config.head_dim,),
        "heads": (heads, config.head_dim),
        "whole": (heads * config.head_dim,),
    }
    return None if config.qk_norm is None else Norm(config, *shapes[config.qk_norm])


def attend(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    mask: Bool[Array, "time keys"],
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch time heads dim"]:
    """Attention of queries to the keys that the mask allows, and to sinks."""
    # Query heads that share a key head are rows of one matrix, which is a quarter
    # faster on a CPU than an axis of their own.
    batch, time, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    q = q.reshape(batch, time, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * time, dim)
    # (batch, kv_heads, group * time, keys), then (batch, kv_heads, group, time, keys)
    scores = jnp.einsum("bkrd,bskd->bkrs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, time, -1) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[None, None, None], scores, -jnp.inf)
    attention_weights = _softmax_with_sinks(scores, sinks).astype(v.dtype)
    weights = attention_weights.reshape(batch, kv_heads, group * time, -1)
    # (batch, kv_heads, group * time, dim)
    y = jnp.einsum("bkrs,bskd->bkrd", weights, v)
    y = y.reshape(batch, kv_heads, group, time, dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, time, heads, dim)


def _softmax_with_sinks(
    scores: Float[Array, "batch kv_heads group time keys"],
    sinks: Float[Array, "heads"] | None,
) -> Float[Array, "batch kv_heads group time keys"]:
    """Softmax over the keys; a sink is one key more, whose value is zero."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    largest = jnp.maximum(scores.max(-1, keepdims=True), sink)
    # Any number may be subtracted from the exponents; the largest keeps them finite.
    largest = jax.lax.stop_gradient(largest)  # (batch, kv_heads, group, time, 1)
    exponentials = jnp.exp(scores - largest)
    total = exponentials.sum(-1, keepdims=True) + jnp.exp(sink - largest)
    return exponentials / total


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """x times a factor that keeps its digits: in bfloat16 it would lose them."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def embedding(config: Any, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table (rows, width), normal with deviation 0.02 at the beginning."""
    return nnx.Embed(
        rows,
        config.width,
        dtype=jnp.dtype(config.dtype),
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )
