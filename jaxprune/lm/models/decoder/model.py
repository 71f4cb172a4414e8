"""One decoder-only transformer in Flax NNX for many families of checkpoints.

GPT-2, Llama, Gemma and their relatives are one program with different switches, all of
them in `DecoderConfig`. Conventions: kernels are `[in, out]`; each
meets its activation in exactly one product, so that the traced program can be pruned
matrix by matrix; the model holds parameters (`nnx.Param`) and nothing else, so
`graphdef, params = nnx.split(model, nnx.Param)` is the whole model. Products
(`jaxprune.lm.models.product`, without forward-mode derivatives) run in
`DecoderConfig.dtype`; norms, rotary angles, softmax, logits and loss are float32,
whatever the parameters' dtype is.

References:
  Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762. Touvron et al.,
  LLaMA, 2023, arXiv 2302.13971. Ainslie et al., GQA, 2023, arXiv 2305.13245. The
  numbers are those of the Hugging Face implementations (tests/lm/models/test_hf.py).
"""

from collections.abc import Callable
from typing import Any, TypeAlias, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxprune.lm.models.decoder.block import Block
from jaxprune.lm.models.decoder.cache import Cache as Cache
from jaxprune.lm.models.decoder.cache import check_length, check_tokens, empty_cache
from jaxprune.lm.models.decoder.config import DecoderConfig as DecoderConfig
from jaxprune.lm.models.decoder.layers import Linear, Norm, embedding, scaled
from jaxprune.lm.models.decoder.rope import cos_and_sin
from jaxprune.lm.models.placement import look_up, row_sharding
from jaxprune.lm.models.product import is_product

LOGITS = 2**25
"""Number of logits that a loss holds at a time: in float32 128 MiB."""

Sample: TypeAlias = tuple[Int[Array, "some"], Float[Array, "some"]]
"""Ids of tokens, and the logarithm of the number that each stands for."""


class Decoder(nnx.Module):
    """A decoder-only transformer; `rngs` gives the keys of the initial parameters.

    Example:
      >>> from jaxprune.lm.models.decoder.rope import linear
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, ropes=(linear(1e4, 8),),
      ... )
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 10), jnp.int32)).shape
      (2, 10, 65)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, float32, normal with deviation 0.02."""
        self.config = config
        self.embedding = embedding(config, config.vocab_size, rngs)
        if not config.ropes:
            rows = config.context + config.position_offset
            self.position_embedding = embedding(config, rows, rngs)
        self.layers = nnx.List(
            [Block(config, i, rngs=rngs) for i in range(config.layers)]
        )
        self.norm = Norm(config, config.width)
        if not config.tie_weights:
            width, vocab, bias = config.width, config.vocab_size, config.head_bias
            self.head = Linear(config, width, vocab, bias=bias, rngs=rngs)

    @overload
    def __call__(
        self, tokens: Array, *, cache: None = None, positions: Array | None = None
    ) -> Array: ...

    @overload
    def __call__(
        self, tokens: Array, *, cache: Cache, positions: Array | None = None
    ) -> tuple[Array, Cache]: ...

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        cache: Cache | None = None,
        positions: Int[Array, "time"] | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits of the token that follows each token.

        Args:
          tokens: integers in [0, vocab_size); one past the end gives NaN logits.
          cache: keys and values of the text before these tokens. There must be room
            for theirs: a full cache cannot raise under jit. Where long sequences have
            rotary angles of their own (`DecoderConfig.switches`), the size of the
            cache counts as the length.
          positions: positions of the tokens, integers (time,), by default one after
            the other behind the cache. Which tokens are attended to is decided by
            their order, not by this.

        Returns:
          Logits, float32 (batch, time, vocab_size), and with a cache the pair of
          the logits and the longer cache.

        Raises:
          TypeError: the tokens are not integers.
          ValueError: the tokens are not (batch, time), or too long.
        """
        x, cache = self.states(self.embed(tokens), cache=cache, positions=positions)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time w"]:
        """The residual stream before the first layer, (batch, time, width)."""
        check_tokens(tokens, "Decoder")
        # (batch, time, width)
        return scaled(look_up(self.embedding, tokens), self.config.embedding_factor)

    def states(
        self,
        x: Float[Array, "batch time width"],
        *,
        cache: Cache | None = None,
        positions: Int[Array, "time"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """The final hidden states, normalised, of embedded tokens.

        Args:
          x: embedded tokens: what `embed` returned, or anything of that shape.
          cache: keys and values of the text before; see the call.
          positions: positions of the tokens; see the call.
          remat: whether the gradient computes the activations inside each layer
            again, to save memory; of few tokens all but its products.

        Returns:
          The states (batch, time, width) and the longer cache (None without one).

        Raises:
          ValueError: the sequence is too long.
        """
        time = x.shape[1]
        size = self.config.context if cache is None else cache.keys[0].shape[1]
        cache_length = jnp.int32(0) if cache is None else cache.length
        # How full a cache is can be known outside jit alone.
        unknown = cache is None or isinstance(cache_length, jax.core.Tracer)
        check_length((0 if unknown else int(cache_length)) + time, size, "Decoder")
        # (time,): where the tokens stand in the text, which the mask goes by.
        order = cache_length + jnp.arange(time, dtype=jnp.int32)
        text_length: int | Array = time if cache is None else size
        if positions is None:
            positions = order
        elif cache is None:
            text_length = jnp.max(positions) + 1
        if not self.config.ropes:
            rows = positions + self.config.position_offset
            x = x + look_up(self.position_embedding, rows)[None]
        # Of each rotary scheme, and of each sliding window.
        cos_sin = {
            rope: cos_and_sin(rope, positions, text_length)
            for rope in self.config.ropes
        }
        masks = _causal_masks(self.config, order, time if cache is None else size)
        keeps = keeps_products(self.config.width, x.shape[0] * time)
        policy = is_product if keeps else None
        kv_caches = []
        for i, layer in enumerate(self.layers):
            kv_cache = None if cache is None else (cache.keys[i], cache.values[i])
            rope, window = self.config.rope(i), self.config.window(i)
            turn = None if rope is None else cos_sin[rope]
            run = jax.checkpoint(layer, policy=policy) if remat else layer
            # (batch, time, width), and keys and values (batch, keys, kv_heads, dim)
            x, kv_cache = run(x, turn, masks[window], kv_cache, cache_length)
            kv_caches.append(kv_cache)
        x = self.norm(x)  # (batch, time, width), what the head reads
        if cache is None:
            return x, None
        keys, values = zip(*kv_caches, strict=True)
        return x, Cache(keys, values, cache_length + time)

    def next_logits(
        self, x: Float[Array, "batch time width"], cache: Cache | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache | None]:
        """Logits after the last of embedded tokens, and the longer cache."""
        x, cache = self.states(x, cache=cache)
        return self.logits(x[:, -1]), cache  # not of all: the vocabulary may be large

    def logits(
        self, x: Float[Array, "... width"], tokens: Int[Array, "some"] | None = None
    ) -> Float[Array, "... some"]:
        """Float32 logits of final hidden states (..., width), of all tokens or some."""
        if self.config.tie_weights:
            table = self.embedding.embedding[...]  # (vocab, width)
            if tokens is not None:
                table = jnp.take(table, tokens, axis=0, mode="clip")
            logits = jax.lax.dot_general(  # (..., vocab)
                x,
                table.astype(x.dtype),
                (((x.ndim - 1,), (1,)), ((), ())),  # over the width; no batch axes
                preferred_element_type="float32",
                out_sharding=row_sharding(x, x.ndim - 1),
            )
        else:
            logits = self.head(x, dtype="float32", outputs=tokens)
        if self.config.logit_scale != 1:
            logits = self.config.logit_scale * logits
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def init_cache(self, batch: int, size: int | None = None) -> Cache:
        """An empty cache for at most, and by default, `context` tokens."""
        config = self.config
        heads = [config.kv_heads] * config.layers
        return empty_cache(config, batch, size, heads, config.head_dim)


def keeps_products(width: int, tokens: int) -> bool:
    """Whether a gradient with `remat` keeps the products of so many tokens at once.

    To make them again takes most of a layer's forward pass. A float of each output
    and token is little beside what a layer trains where tokens are few.

    Args:
      width: width of the decoder.
      tokens: number of tokens, of all sequences together.

    Returns:
      Whether they are at most twice the width.
    """
    return tokens <= 2 * width


def loss_per_token(
    model: Decoder,
    tokens: Int[Array, "batch time"],
    targets: Int[Array, "batch time"],
    *,
    rows: int | None = None,
) -> Float[Array, "batch time"]:
    """Cross entropy of each target, in nats, a few tokens' logits at a time.

    log(sum over v of exp(logit v)) - logit of the target. The logits of all tokens
    never exist at once, nor for the gradient, which makes them again.

    Args:
      model: model, of parameters in memory or traced ones.
      tokens: integers (batch, time).
      targets: the tokens that follow, integers (batch, time) in [0, vocab_size).
      rows: number of tokens whose logits are held at a time, but at least one of each
        sequence; by default as many as make 128 MiB.

    Returns:
      Float32 (batch, time).

    Raises:
      ValueError: the targets have another shape than the tokens, or `rows` is not
        at least 1.

    Example:
      >>> from jaxprune.lm.models.decoder.rope import linear
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, ropes=(linear(1e4, 8),),
      ... )
      >>> tokens = jnp.zeros((2, 10), jnp.int32)
      >>> loss_per_token(Decoder(config, rngs=nnx.Rngs(0)), tokens, tokens).shape
      (2, 10)
    """
    if targets.shape != tokens.shape:
        raise ValueError(
            f"loss_per_token needs targets of the tokens' shape {tokens.shape}, got "
            f"{targets.shape}"
        )
    x, _ = model.states(model.embed(tokens))
    return cross_entropy(model, x, targets, rows=rows)


def cross_entropy(
    model: Decoder,
    states: Float[Array, "batch time width"],
    targets: Int[Array, "batch time"],
    *,
    rows: int | None = None,
    sample: Sample | None = None,
) -> Float[Array, "batch time"]:
    """Cross entropy (nats) by final hidden states.

    Args:
      model: model whose head reads the states.
      states: final hidden states (batch, time, width).
      targets: the tokens that follow, integers (batch, time).
      rows: number of tokens at a time; see `loss_per_token`.
      sample: the tokens that stand for all, the targets among them; see
        `sampled_logits`.

    Returns:
      Float32 (batch, time).
    """

    def loss(state: Float[Array, "batch width"], target: Int[Array, "batch"]) -> Array:
        logits = sampled_logits(model, state, sample)  # (batch, vocab)
        logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - logit  # (batch,)

    vocab = model.config.vocab_size
    if sample is not None:
        vocab, targets = len(sample[0]), jnp.searchsorted(sample[0], targets)
    return map_tokens(loss, (states, targets), vocab=vocab, rows=rows)


def sampled_logits(
    model: Decoder, state: Float[Array, "batch width"], sample: Sample | None
) -> Float[Array, "batch some"]:
    """Logits of some tokens, each raised by what it stands for.

    Args:
      model: model whose head reads the states.
      state: final hidden states.
      sample: ids of tokens, ascending, and the logarithm of the number that each stands
        for; None for all tokens.

    Returns:
      Float32 logits, whose exponentials add up as those of all tokens do.
    """
    if sample is None:
        return model.logits(state)
    tokens, log_counts = sample
    return model.logits(state, tokens) + log_counts[None]


def map_tokens(
    fn: Callable[..., Any],
    arrays: tuple[Array, ...],
    *,
    vocab: int,
    rows: int | None = None,
) -> Any:
    """Applies a function that makes logits to a few tokens at a time.

    The gradient computes the logits again, a few tokens at a time too.

    Args:
      fn: function from the arrays without their axis of time to (batch, ...), or a
        pytree of such.
      arrays: arrays (batch, time, ...).
      vocab: number of logits that a token takes.
      rows: number of tokens at a time; see `loss_per_token`.

    Returns:
      (batch, time, ...), or a pytree of such.

    Raises:
      ValueError: `rows` is not at least 1.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 2, 3)
      >>> map_tokens(lambda x: x.sum(-1), (x,), vocab=3).tolist()
      [[3.0, 12.0]]
    """
    rows = max(1, LOGITS // vocab) if rows is None else rows
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}; leave it out")
    batch, time = arrays[0].shape[:2]
    # The batch may lie on many devices, so the map is over time.
    by_time = tuple(array.swapaxes(0, 1) for array in arrays)  # (time, batch, ...)
    at_once = min(max(1, rows // max(1, batch)), time)  # tokens of each sequence
    step = jax.checkpoint(lambda arrays: fn(*arrays))
    mapped = jax.lax.map(step, by_time, batch_size=at_once)  # (time, batch, ...)
    return jax.tree.map(lambda array: array.swapaxes(0, 1), mapped)


def _causal_masks(
    config: DecoderConfig, order: Int[Array, "time"], keys: int
) -> dict[int | None, Bool[Array, "time keys"]]:
    """For each window of the layers, which keys each token may attend to."""
    query = order[:, None]  # (time, 1)
    key = jnp.arange(keys, dtype=jnp.int32)[None]  # (1, keys)
    causal = key <= query
    windows = {config.window(i) for i in range(config.layers)}
    return {
        window: causal if window is None else causal & (key > query - window)
        for window in windows
    }
