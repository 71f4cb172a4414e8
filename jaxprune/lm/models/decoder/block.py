"""A block of a `Decoder`: where norms stand, and what is added to what."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.experts import Experts
from jaxprune.lm.models.decoder.layers import (
    MLP,
    Attention,
    CosSin,
    KVCache,
    Norm,
    apply_norm,
)


class Block(nnx.Module):
    """Attention and MLP, added to what comes in; `DecoderConfig.block` places norms."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        """Makes the layers; `rngs` is read, not kept."""
        pre = config.block != "post"
        post = config.block in ("post", "sandwich")

        def norm(present: bool) -> Norm | None:
            return Norm(config, config.width) if present else None

        # Norms before attention and MLP, and behind them before they are added.
        self.norm_attention = norm(pre)
        self.attention = Attention(config, layer, rngs=rngs)
        self.norm_mlp = norm(pre and config.block != "parallel_shared")
        # Both map (batch, time, width) to itself.
        mlp = Experts if config.experts else MLP
        self.mlp = mlp(config, rngs=rngs)
        self.norm_attended, self.norm_added = norm(post), norm(post)
        self.parallel = config.block in ("parallel", "parallel_shared")
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        cos_sin: CosSin | None,
        mask: Bool[Array, "time keys"],
        kv_cache: KVCache | None,
        cache_length: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], KVCache]:
        """Returns the residual stream after the block, and its keys and values.

        Args:
          x: the residual stream.
          cos_sin: see `Attention`, as the three below.
          mask: which keys each token may attend to.
          kv_cache: keys and values of this block's attention.
          cache_length: number of the cache's positions that are filled.
        """
        normalised = apply_norm(self.norm_attention, x)  # (batch, time, width)
        y, kv_cache = self.attention(normalised, cos_sin, mask, kv_cache, cache_length)
        y = self._scaled(apply_norm(self.norm_attended, y))
        if self.parallel:  # the MLP does not see what attention adds
            if self.norm_mlp is not None:
                normalised = self.norm_mlp(x)
            return x + y + self._scaled(self.mlp(normalised)), kv_cache
        x = x + y
        y = self.mlp(apply_norm(self.norm_mlp, x))
        return x + self._scaled(apply_norm(self.norm_added, y)), kv_cache

    def _scaled(self, y: Array) -> Array:
        # In float32: in bfloat16 the factor itself would lose digits.
        if self.residual_scale == 1:
            return y
        return (y.astype(jnp.float32) * self.residual_scale).astype(y.dtype)
