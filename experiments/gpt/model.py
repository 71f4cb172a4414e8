"""GPT-2 in Flax NNX, as small as nanoGPT and with the same numbers as both.

Conventions. Kernels are `[in, out]` (torch's nanoGPT keeps `[out, in]`, GPT-2's
`Conv1D` is like ours); the query, key and value kernels are one matrix, in that
order. The model holds parameters (`nnx.Param`) and nothing else: dropout takes its
key at the call, so `graphdef, params = nnx.split(model, nnx.Param)` is the whole
model and may be used as a pure function of `params`. Parameters are float32; the
products run in `GPTConfig.dtype`; softmax, logits and loss are float32.

References:
  Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised
  Multitask Learners (2019). Initialisation and presets: Karpathy, nanoGPT
  (github.com/karpathy/nanoGPT, model.py and config/train_shakespeare_char.py).
  Differences: dropout's random numbers, and the key of a dropout mask is an
  argument.
"""

import math
from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.gpt.config import PRESETS as PRESETS
from experiments.gpt.config import GPTConfig as GPTConfig
from experiments.gpt.config import flops_per_token as flops_per_token
from experiments.gpt.config import matrix_sizes as matrix_sizes
from experiments.gpt.config import preset as preset
from jaxprune.lm.models.decoder.cache import Cache as Cache
from jaxprune.lm.models.decoder.cache import check_length, check_tokens, empty_cache
from jaxprune.lm.models.decoder.layers import embedding
from jaxprune.lm.models.placement import look_up
from jaxprune.lm.models.product import product


class Attention(nnx.Module):
    """Causal self-attention, `qkv` in and `out` back to the residual stream."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        """Makes the two matrices; `rngs` is read, not kept."""
        self.qkv = _linear(config, config.width, 3 * config.width, rngs)
        self.out = _linear(config, config.width, config.width, rngs, residual=True)
        self.dropout = nnx.Dropout(config.dropout)
        self.heads = config.heads

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        positions: Int[Array, "time"],
        kv_cache: tuple[Array, Array] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch time width"], tuple[Array, Array]]:
        """Attends to `kv_cache` (if any) and to the tokens up to each position."""
        batch, time, width = x.shape
        shape = (batch, time, self.heads, width // self.heads)
        # (batch, time, heads, features of a head); those of the past are longer
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        if kv_cache is not None:
            # Behind what the cache holds: (batch, time, heads, features) from this
            # position on.
            start = (0, positions[0], 0, 0)
            k = jax.lax.dynamic_update_slice(kv_cache[0], k, start)
            v = jax.lax.dynamic_update_slice(kv_cache[1], v, start)
        # (batch, heads, time, keys), float32
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        mask = jnp.arange(k.shape[1])[None, :] <= positions[:, None]  # (time, keys)
        scores = jnp.where(mask[None, None], scores / math.sqrt(shape[-1]), -jnp.inf)
        # (batch, heads, time, keys), in the dtype of the values
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        weights_key, output_key = _split(key, 2)
        # nanoGPT drops attention weights and, below, the projection's output.
        weights = self.dropout(weights, deterministic=key is None, rngs=weights_key)
        x = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, time, width)
        x = self.dropout(self.out(x), deterministic=key is None, rngs=output_key)
        return x, (k, v)


class MLP(nnx.Module):
    """Four times wider, gelu, and back."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        """Makes the two matrices; `rngs` is read, not kept."""
        self.up = _linear(config, config.width, 4 * config.width, rngs)
        self.down = _linear(config, 4 * config.width, config.width, rngs, residual=True)
        self.dropout = nnx.Dropout(config.dropout)
        self.approximate = config.gelu == "tanh"

    def __call__(
        self, x: Float[Array, "batch time width"], key: PRNGKeyArray | None
    ) -> Float[Array, "batch time width"]:
        """Applies the layer to each token by itself."""
        x = self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))
        return self.dropout(x, deterministic=key is None, rngs=key)


class Block(nnx.Module):
    """Normalise, attend, add; normalise, MLP, add."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        """Makes the layers; `rngs` is read, not kept."""
        self.norm_attention = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_mlp = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        positions: Int[Array, "time"],
        kv_cache: tuple[Array, Array] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "batch time width"], tuple[Array, Array]]:
        """Returns the residual stream after the block, and its keys and values."""
        attention_key, mlp_key = _split(key, 2)
        attended, kv_cache = self.attention(
            self.norm_attention(x), positions, kv_cache, attention_key
        )
        # Pre-normalisation: the stream itself is never normalised inside a block.
        x = x + attended
        return x + self.mlp(self.norm_mlp(x), mlp_key), kv_cache


class GPT(nnx.Module):
    """A decoder-only transformer with learned positions.

    Args:
      config: the shape.
      rngs: source of the keys of the initial parameters; not kept.

    Example:
      >>> model = GPT(preset("cpu", vocab_size=65, layers=1), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 10), jnp.int32)).shape
      (2, 10, 65)
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        """Makes the parameters with nanoGPT's initialisation."""
        self.config = config
        self.token_embedding = embedding(config, config.vocab_size, rngs)
        self.position_embedding = embedding(config, config.context, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_weights:
            self.head = nnx.Linear(
                config.width,
                config.vocab_size,
                use_bias=False,
                dtype=jnp.dtype(config.dtype),
                kernel_init=nnx.initializers.normal(0.02),
                dot_general=product,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    @overload
    def __call__(
        self, tokens: Array, *, key: PRNGKeyArray | None = None, cache: None = None
    ) -> Array: ...

    @overload
    def __call__(
        self, tokens: Array, *, key: PRNGKeyArray | None = None, cache: Cache
    ) -> tuple[Array, Cache]: ...

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        key: PRNGKeyArray | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits of the token that follows each token.

        Args:
          tokens: token ids in [0, vocab_size); one past the end gives NaN logits.
          key: random key of the dropout masks; None means no dropout.
          cache: keys and values of the tokens before these. There must be room
            for them: a full cache cannot raise under jit.

        Returns:
          Logits, float32 (batch, time, vocab_size), and with a cache the pair of
          the logits and the longer cache.

        Raises:
          TypeError: the tokens are not integers.
          ValueError: the tokens are not (batch, time), or too long.
        """
        x, cache = self._states(self.embed(tokens), key=key, cache=cache)
        logits = self._logits(x)  # (batch, time, vocab)
        return logits if cache is None else (logits, cache)

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time w"]:
        """The embedded tokens (batch, time, width), without their positions."""
        check_tokens(tokens, "GPT")
        return look_up(self.token_embedding, tokens)

    def next_logits(
        self, x: Float[Array, "batch time width"], cache: Cache | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache | None]:
        """Logits after the last of embedded tokens, and the longer cache."""
        x, cache = self._states(x, key=None, cache=cache)
        return self._logits(x)[:, -1], cache

    def _states(
        self,
        x: Float[Array, "batch time width"],
        *,
        key: PRNGKeyArray | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """The normalised states of embedded tokens, and the longer cache."""
        time = x.shape[1]
        size = self.config.context if cache is None else cache.keys[0].shape[1]
        check_length(time, size, "GPT")
        start = jnp.int32(0) if cache is None else cache.length
        positions = start + jnp.arange(time, dtype=jnp.int32)
        keys = _split(key, self.config.layers + 1)  # the last is the embedding's
        x = x + look_up(self.position_embedding, positions)[None]
        x = self.dropout(x, deterministic=key is None, rngs=keys[-1])
        kv_caches = []
        for i, block in enumerate(self.blocks):
            kv_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x, kv_cache = block(x, positions, kv_cache, keys[i])
            kv_caches.append(kv_cache)
        x = self.norm(x)
        if cache is None:
            return x, None
        layer_keys, layer_values = zip(*kv_caches, strict=True)
        # One array a layer: an update leaves those of the other layers alone.
        return x, Cache(layer_keys, layer_values, start + time)

    def init_cache(self, batch: int, size: int | None = None) -> Cache:
        """An empty cache for at most, and by default, `context` tokens."""
        config, heads = self.config, self.config.heads
        by_layer = [heads] * config.layers
        return empty_cache(config, batch, size, by_layer, config.width // heads)

    def _logits(self, x: Array) -> Array:
        if not self.config.tie_weights:
            return self.head(x)
        table = self.token_embedding.embedding[...].astype(x.dtype)  # (vocab, width)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def loss(
    model: GPT,
    tokens: Int[Array, "batch time"],
    targets: Int[Array, "batch time"],
    *,
    key: PRNGKeyArray | None = None,
    weights: Float[Array, "batch time"] | None = None,
) -> Float[Array, ""]:
    """Cross entropy of the targets, the mean over tokens, in nats per token.

    Args:
      model: the model.
      tokens: token ids, integers (batch, time).
      targets: the tokens that follow, integers (batch, time); one past the end
        of the vocabulary gives NaN.
      key: random key of the dropout masks; None means no dropout.
      weights: weight of each target in the mean; the mean is the weighted sum over the
        sum of the weights (NaN if that is zero). None counts all alike.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: targets or weights have another shape than the tokens.
    """
    for name, array in (("targets", targets), ("weights", weights)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"loss needs {name} of the tokens' shape {tokens.shape}, "
                f"got {array.shape}"
            )
    logits = model(tokens, key=key)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen  # (batch, time)
    if weights is None:
        return jnp.mean(nats)
    return jnp.sum(nats * weights) / jnp.sum(weights)


def _linear(
    config: GPTConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    residual: bool = False,
) -> nnx.Linear:
    # GPT-2's: each block adds two terms to the stream, whose variance then stays of
    # order 1 whatever the depth.
    scale = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=config.bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(scale),
        dot_general=product,
        rngs=rngs,
    )


def _norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width,
        epsilon=1e-5,
        use_bias=config.bias,
        # E[x^2] - E[x]^2 cancels where the mean is large against the spread.
        use_fast_variance=False,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _split(key: PRNGKeyArray | None, count: int) -> Sequence[PRNGKeyArray | None]:
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
