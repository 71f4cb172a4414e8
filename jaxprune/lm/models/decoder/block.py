"""A block of a `Decoder`: where norms stand, and what is added to what."""

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
    scaled,
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
        shared = config.block == "parallel_shared"
        self.parallel = shared or config.block == "parallel"
        self.norm_attention = norm(pre)
        # Both map (batch, time, width) to itself.
        self.attention = Attention(config, layer, rngs=rngs)
        self.norm_mlp = norm(pre and not shared)
        self.mlp = (Experts if config.experts else MLP)(config, rngs=rngs)
        self.norm_attended = norm(post)
        self.norm_added = norm(post)
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        cos_sin: CosSin | None,
        mask: Bool[Array, "time keys"],
        kv_cache: KVCache | None,
        cache_length: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], KVCache | None]:
        """Returns the residual stream after the block, and its keys and values.

        Args:
          x: the residual stream.
          cos_sin: see `Attention`, as the three below.
          mask: which keys each token may attend to.
          kv_cache: keys and values of this block's attention.
          cache_length: number of the cache's positions that are filled.
        """
        before = x
        normalised = apply_norm(self.norm_attention, x)  # (batch, time, width)
        y, kv_cache = self.attention(normalised, cos_sin, mask, kv_cache, cache_length)
        x = x + scaled(apply_norm(self.norm_attended, y), self.residual_scale)
        if self.parallel:  # the MLP does not see what attention adds
            if self.norm_mlp is not None:
                normalised = self.norm_mlp(before)
            return x + scaled(self.mlp(normalised), self.residual_scale), kv_cache
        y = self.mlp(apply_norm(self.norm_mlp, x))
        return x + scaled(apply_norm(self.norm_added, y), self.residual_scale), kv_cache
