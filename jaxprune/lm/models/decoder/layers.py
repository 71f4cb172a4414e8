"""The layers of a `Decoder`: norms, attention and MLP.

Norms, rotary turns, scores and softmax are float32, products run in
`DecoderConfig.dtype`. A layer holds parameters and settings, nothing else.

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
from jaxtyping import Array, Float, Int

from jaxprune.lm.models.decoder.config import DecoderConfig, Norms
from jaxprune.lm.models.decoder.rope import rotate
from jaxprune.lm.models.placement import broadcast, rows_of

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""The nonlinearities of an MLP by their names in `DecoderConfig`."""
Turn = tuple[Array, Array]


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
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        first = 0.0 if self.kind == "rms_plus_one" else 1.0
        plain = self.kind == "layer_plain"
        self.scale = None if plain else nnx.Param(jnp.full(shape, first, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape)) if self.kind == "layer" else None

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalises in float32."""
        wide = x.astype(jnp.float32)  # (..., width), as all here
        if self.kind.startswith("layer"):
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)  # (..., 1)
        wide = wide * jax.lax.rsqrt(square + self.epsilon)
        if self.scale is None:
            return wide.astype(x.dtype)
        scale = broadcast(self.scale[...], x)
        if self.kind == "rms":
            # Llama and its relatives round before they scale, Gemma after.
            return wide.astype(x.dtype) * scale.astype(x.dtype)
        scale = scale.astype(jnp.float32)
        wide = wide * (1 + scale if self.kind == "rms_plus_one" else scale)
        if self.bias is not None:
            wide = wide + broadcast(self.bias[...], x).astype(jnp.float32)
        return wide.astype(x.dtype)


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
        kernel = 0.02 * jax.random.normal(rngs.params(), (inputs, outputs))
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None
        self.dtype = config.dtype

    def __call__(
        self, x: Float[Array, "... inputs"], *, dtype: str | None = None
    ) -> Float[Array, "... outputs"]:
        """The product in the compute dtype; the result is of `dtype` if given."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        y = contract(x, kernel, 0, dtype)  # (..., outputs)
        if self.bias is None:
            return y
        return y + broadcast(self.bias[...], y).astype(y.dtype)


def contract(
    x: Float[Array, "... inputs"], matrix: Array, axis: int, dtype: str | None = None
) -> Float[Array, "... outputs"]:
    """Contracts the last axis of `x` with one of a matrix; rows keep their sharding."""
    axes = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(
        x,
        matrix,
        axes,
        preferred_element_type=dtype,
        out_sharding=rows_of(x, x.ndim - 1),
    )


class Attention(nnx.Module):
    """Causal self-attention; several query heads may share a key and a value head."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        width, bias = config.width, config.qkv_bias
        if config.fused:
            self.qkv = Linear(config, width, q + 2 * kv, bias=bias, rngs=rngs)
        else:
            self.q = Linear(config, width, q, bias=bias, rngs=rngs)
            self.k = Linear(config, width, kv, bias=bias, rngs=rngs)
            self.v = Linear(config, width, kv, bias=bias, rngs=rngs)
        self.out = Linear(config, q, width, bias=config.out_bias, rngs=rngs)
        self.norm_q = _norm_of_heads(config, config.heads)
        self.norm_k = _norm_of_heads(config, config.kv_heads)
        self.sinks = nnx.Param(jnp.zeros(config.heads)) if config.sinks else None
        scale = config.attention_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.softcap, self.qk_norm = config.attention_softcap, config.qk_norm
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.fused, self.by_head = config.fused, config.fused_by_head
        rope = config.rope(layer)
        self.interleaved = rope is not None and rope.interleaved

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        turn: Turn | None,
        seen: Array,
        past: tuple[Array, Array] | None,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], tuple[Array, Array]]:
        """Attends to the keys that `seen` (time, keys) allows, `past` included."""
        batch, time, _ = x.shape
        q, k, v = self._queries_keys_values(x)
        if turn is not None:
            q, k = (rotate(y, turn, interleaved=self.interleaved) for y in (q, k))
        if past is not None:  # (batch, size, kv_heads, head_dim)
            k = jax.lax.dynamic_update_slice(past[0], k, (0, start, 0, 0))
            v = jax.lax.dynamic_update_slice(past[1], v, (0, start, 0, 0))
        # (batch, time, heads, head_dim)
        sinks = None if self.sinks is None else self.sinks[...]
        x = attend(q, k, v, seen, self.scale, self.softcap, sinks)
        return self.out(x.reshape(batch, time, -1)), (k, v)

    def _queries_keys_values(self, x: Array) -> list[Array]:
        """Each (batch, time, heads or kv_heads, head_dim), q and k normalised."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        parts = self._products(x)
        if self.qk_norm == "whole":
            parts = self._normed(parts)
        parts = [
            part.reshape(*x.shape[:2], n, -1)
            for part, n in zip(parts, heads, strict=True)
        ]
        return parts if self.qk_norm == "whole" else self._normed(parts)

    def _normed(self, parts: list[Array]) -> list[Array]:
        q, k, v = parts
        return [normed(self.norm_q, q), normed(self.norm_k, k), v]

    def _products(self, x: Array) -> list[Array]:
        """Queries, keys and values, (batch, time, features)."""
        heads, kv_heads = self.heads, self.kv_heads
        if not self.fused:
            return [self.q(x), self.k(x), self.v(x)]
        fused = self.qkv(x)
        if not self.by_head:
            size = fused.shape[-1] // (heads + 2 * kv_heads)
            cuts = [heads * size, (heads + kv_heads) * size]
            return jnp.split(fused, cuts, axis=-1)
        group = heads // kv_heads
        # (batch, time, kv_heads, group + 2, head_dim)
        fused = fused.reshape(*x.shape[:2], kv_heads, group + 2, -1)
        parts = jnp.split(fused, [group, group + 1], axis=-2)
        return [part.reshape(*x.shape[:2], -1) for part in parts]


class MLP(nnx.Module):
    """Wider, a nonlinearity, and back."""

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, wide: int | None = None
    ):
        """Makes the matrices; `rngs` is read, not kept."""
        width, bias = config.width, config.mlp_bias
        wide = config.mlp_width if wide is None else wide
        self.activation = config.activation
        self.gated, self.fused = config.gated, config.gated and config.fused
        if self.fused:
            self.gate_up = Linear(config, width, 2 * wide, bias=bias, rngs=rngs)
        else:
            self.up = Linear(config, width, wide, bias=bias, rngs=rngs)
        if self.gated and not self.fused:
            self.gate = Linear(config, width, wide, bias=bias, rngs=rngs)
        self.down = Linear(config, wide, width, bias=bias, rngs=rngs)

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
            gate, up = self.gate(x), self.up(x)
        return self.down(act(gate) * up)


def normed(norm: Norm | None, x: Array) -> Array:
    """Normalised, where there is a norm."""
    return x if norm is None else norm(x)


def _norm_of_heads(config: DecoderConfig, heads: int) -> Norm | None:
    """The norm of queries or keys."""
    shapes = {
        "head": (config.head_dim,),
        "heads": (heads, config.head_dim),
        "whole": (heads * config.head_dim,),
    }
    return None if config.qk_norm is None else Norm(config, *shapes[config.qk_norm])


def attend(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    seen: Array,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> Float[Array, "batch time heads dim"]:
    """Attention of queries to sinks and to the keys that `seen` (time, keys) allows."""
    # Query heads that share a key head are rows of one matrix, which is a quarter
    # faster on a CPU than an axis of their own.
    batch, time, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    q = q.reshape(batch, time, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    rows = q.reshape(batch, kv_heads, group * time, dim)  # (batch, kv, rows, dim)
    dot = jnp.einsum("bkrd,bskd->bkrs", rows, k, preferred_element_type=jnp.float32)
    dot = dot.reshape(batch, kv_heads, group, time, -1) * scale
    if softcap is not None:
        dot = softcap * jnp.tanh(dot / softcap)
    # (batch, kv, group, time, keys), float32
    dot = jnp.where(seen[None, None, None], dot, -jnp.inf)
    if sinks is None:
        share = jax.nn.softmax(dot, axis=-1)
    else:
        own = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        most = jax.lax.stop_gradient(jnp.maximum(dot.max(-1, keepdims=True), own))
        share = jnp.exp(dot - most)
        share = share / (share.sum(-1, keepdims=True) + jnp.exp(own - most))
    share = share.astype(v.dtype).reshape(batch, kv_heads, group * time, -1)
    x = jnp.einsum("bkrs,bskd->bkrd", share, v)  # (batch, kv, rows, dim)
    x = x.reshape(batch, kv_heads, group, time, dim).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, time, heads, dim)


def embedding(config: Any, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table (rows, width), normal with deviation 0.02 at the beginning."""
    return nnx.Embed(
        rows,
        config.width,
        dtype=jnp.dtype(config.dtype),
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )
