"""A block of a `Decoder`: where norms stand, and what is added to what."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.experts import Experts
from jaxprune.lm.models.decoder.layers import MLP, Attention, Norm, Turn, normed


class Block(nnx.Module):
    """Attention and MLP, added to what comes in; `DecoderConfig.block` places norms."""

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        """Makes the layers; `rngs` is read, not kept."""
        kind = config.block
        before, behind = kind != "post", kind in ("post", "sandwich")

        def norm(there: bool) -> Norm | None:
            return Norm(config, config.width) if there else None

        self.norm_attention = norm(before)
        self.attention = Attention(config, layer, rngs=rngs)
        self.norm_mlp = norm(before and kind != "parallel_shared")
        mixed = config.experts > 0
        self.mlp = (Experts if mixed else MLP)(config, rngs=rngs)
        self.norm_attended, self.norm_added = norm(behind), norm(behind)
        self.parallel = kind in ("parallel", "parallel_shared")
        self.scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        turn: Turn | None,
        seen: Array,
        past: tuple[Array, Array] | None,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch time width"], tuple[Array, Array]]:
        """Returns the residual stream after the block, and its keys and values."""
        first = normed(self.norm_attention, x)  # (batch, time, width), as all here
        y, past = self.attention(first, turn, seen, past, start)
        y = self._scaled(normed(self.norm_attended, y))
        if self.parallel:
            second = first if self.norm_mlp is None else self.norm_mlp(x)
            return x + y + self._scaled(self.mlp(second)), past
        x = x + y
        y = self.mlp(normed(self.norm_mlp, x))
        return x + self._scaled(normed(self.norm_added, y)), past

    def _scaled(self, y: Array) -> Array:
        # In float32: in bfloat16 the factor itself would lose digits.
        if self.scale == 1:
            return y
        return (y.astype(jnp.float32) * self.scale).astype(y.dtype)
