"""The layers of a `Decoder`: norms, attention, MLP, and the block of them.

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

from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.decoder.rope import rotate
from jaxprune.models.placement import broadcast, rows_of

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
Turn = tuple[Array, Array]


class Numeric(Protocol):
    """What norms and products need to know of a model."""

    @property
    def norm(self) -> Literal["layer", "rms", "rms_plus_one"]:
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
    "layer" subtracts the mean before and adds a bias after.
    """

    def __init__(self, config: Numeric, width: int):
        """Makes the scale, 1 at the beginning, and the bias."""
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        first = 0.0 if self.kind == "rms_plus_one" else 1.0
        self.scale = nnx.Param(jnp.full((width,), first))
        self.bias = nnx.Param(jnp.zeros((width,))) if self.kind == "layer" else None

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Normalises in float32."""
        wide = x.astype(jnp.float32)  # (..., width), as all here
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)  # (..., 1)
        wide = wide * jax.lax.rsqrt(square + self.epsilon)
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
    """The last axis of `x` times axis 0 or 1 of a matrix, which lies as the rows do."""
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
        self.norm_q = Norm(config, config.head_dim) if config.qk_norm else None
        self.norm_k = Norm(config, config.head_dim) if config.qk_norm else None
        scale = config.attention_scale
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.fused = config.fused

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
        # (batch, time, heads or kv_heads, head_dim)
        q, k, v = (part.reshape(batch, time, n, -1) for part, n in self._products(x))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:  # (batch, size, kv_heads, head_dim)
            k = jax.lax.dynamic_update_slice(past[0], k, (0, start, 0, 0))
            v = jax.lax.dynamic_update_slice(past[1], v, (0, start, 0, 0))
        x = attend(q, k, v, seen, self.scale)  # (batch, time, heads, head_dim)
        return self.out(x.reshape(batch, time, -1)), (k, v)

    def _products(self, x: Array) -> list[tuple[Array, int]]:
        """Queries, keys and values (batch, time, features), and their heads."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        if not self.fused:
            parts = [self.q(x), self.k(x), self.v(x)]
        else:
            fused = self.qkv(x)  # queries, then keys, then values
            size = fused.shape[-1] // sum(heads)
            cuts = [self.heads * size, (self.heads + self.kv_heads) * size]
            parts = jnp.split(fused, cuts, axis=-1)
        return list(zip(parts, heads, strict=True))


class MLP(nnx.Module):
    """Wider, a nonlinearity, and back."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        width, wide, bias = config.width, config.mlp_width, config.mlp_bias
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
        act = _ACTIVATIONS[self.activation]
        if not self.gated:
            return self.down(act(self.up(x)))
        if self.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(act(gate) * up)


class Block(nnx.Module):
    """Normalise, attend, add; normalise, MLP, add; some normalise what they add."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        """Makes the layers; `rngs` is read, not kept."""
        width, post = config.width, config.post_norms
        self.norm_attention = Norm(config, width)
        self.attention = Attention(config, layer, rngs=rngs)
        self.norm_mlp = Norm(config, width)
        self.mlp = MLP(config, rngs=rngs)
        self.norm_attended = Norm(config, width) if post else None
        self.norm_added = Norm(config, width) if post else None

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        turn: Turn | None,
        seen: Array,
        past: tuple[Array, Array] | None,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], tuple[Array, Array]]:
        """Returns the residual stream after the block, and its keys and values."""
        y, past = self.attention(self.norm_attention(x), turn, seen, past, start)
        x = x + (y if self.norm_attended is None else self.norm_attended(y))
        y = self.mlp(self.norm_mlp(x))  # (batch, time, width)
        return x + (y if self.norm_added is None else self.norm_added(y)), past


def attend(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    seen: Array,
    scale: float,
) -> Float[Array, "batch time heads dim"]:
    """Attention of queries to the keys that `seen` (time, keys) allows."""
    # Query heads that share a key head are rows of one matrix, which is a quarter
    # faster on a CPU than an axis of their own.
    batch, time, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    q = q.reshape(batch, time, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    rows = q.reshape(batch, kv_heads, group * time, dim)  # (batch, kv, rows, dim)
    dot = jnp.einsum("bkrd,bskd->bkrs", rows, k, preferred_element_type=jnp.float32)
    dot = dot.reshape(batch, kv_heads, group, time, -1) * scale
    # (batch, kv, group, time, keys), float32
    dot = jnp.where(seen[None, None, None], dot, -jnp.inf)
    share = jax.nn.softmax(dot, axis=-1).astype(v.dtype)
    share = share.reshape(batch, kv_heads, group * time, -1)
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
