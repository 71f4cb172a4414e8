"""Phi-3-vision: image tokens, four CLIP patches each, take the place of words.

An image is seen whole (the global view) and cut into crops of the tower's size. Two by
two patches become one token; a learned token ends each row of them, another stands
between the crops and the global view. Which row of all image tokens a word of the
prompt is replaced by is computed beforehand (`phi3_vision.preprocess`), so one compiled
program serves pictures of any form.

Reference:
  Abdin et al.: Phi-3 Technical Report, 2024, arXiv 2404.14219, section 6. Dong et
  al.: InternLM-XComposer2-4KHD, 2024, arXiv 2404.06512 (the crops).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.phi3_vision.tower import ClipConfig, ClipTower
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.layers import Linear
from jaxprune.lm.models.decoder.model import Cache, Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3VisionConfig:
    """The shape of a `Phi3Vision`; checked when it is made.

    Attributes:
      decoder: the language model's.
      tower: the image tower's.
      skipped: number of the tower's last layers that are not run.
      crops: greatest number of crops of an image, the global view not counted.

    Raises:
      ValueError: two patches do not fit the tower's grid, or no layer would be run.
    """

    decoder: DecoderConfig
    tower: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    skipped: int = 1
    # A setting of the processor alone: models that differ in it are the same program.
    crops: int = dataclasses.field(default=16, compare=False)

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.tower.grid % 2:
            raise ValueError(
                "Phi3VisionConfig needs an even number of patches along a side, got "
                f"{self.tower.grid}"
            )
        if not 0 <= self.skipped < self.tower.layers or self.crops < 1:
            raise ValueError(
                "Phi3VisionConfig needs 0 <= skipped < layers of the tower and crops "
                f">= 1, got skipped={self.skipped} and crops={self.crops}"
            )

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of the products."""
        return self.decoder.dtype

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "Phi3VisionConfig":
        """The same shape with products of another type, in both halves."""
        return dataclasses.replace(
            self,
            decoder=self.decoder.with_dtype(dtype),
            tower=dataclasses.replace(self.tower, dtype=dtype),
        )

    @property
    def side(self) -> int:
        """Image tokens along each side of a crop."""
        return self.tower.grid // 2


def unused(config: Phi3VisionConfig) -> tuple[str, ...]:
    """Globs of the leaves that no output depends on.

    The tower's last layers and its final norm are in the checkpoint and never run.
    They receive no gradient, so criteria that use gradients would prune them first.
    Exclude them: `prunable=jp.tree.excluding(*unused(config), "separator", "row_end")`.

    Args:
      config: shape of the model.

    Returns:
      Globs on path names.

    Example:
      >>> decoder = DecoderConfig(
      ...     vocab_size=5, context=8, layers=1, width=4, heads=1, kv_heads=1,
      ...     head_dim=4, mlp_width=8,
      ... )
      >>> unused(Phi3VisionConfig(decoder=decoder))
      ('tower/layers/23/*', 'tower/norm/*')
    """
    layers = config.tower.layers
    skipped = range(layers - config.skipped, layers)
    return (*(f"tower/layers/{i}/*" for i in skipped), "tower/norm/*")


class Phi3Vision(nnx.Module):
    """The model: `tower`, projector and `decoder`; `rngs` makes the parameters."""

    def __init__(self, config: Phi3VisionConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, float32; the two separators are zeros."""
        self.config = config
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.tower = ClipTower(config.tower, rngs=rngs)
        inner, width = 4 * config.tower.width, config.decoder.width
        self.separator = nnx.Param(jnp.zeros((1, 1, inner)))
        self.row_end = nnx.Param(jnp.zeros((1, 1, 1, inner)))
        self.project_in = Linear(config.decoder, inner, width, bias=True, rngs=rngs)
        self.project_out = Linear(config.decoder, width, width, bias=True, rngs=rngs)

    def image_tokens(
        self, pixels: Float[Array, "crops height width 3"], *, remat: bool = False
    ) -> Float[Array, "rows width"]:
        """All that a word may be replaced by, of the normalised views of all pictures.

        Returns:
          The end of a row, the separator, and then side x side tokens of each crop,
          row by row: (2 + crops * side^2, width).
        """
        config = self.config
        layers = config.tower.layers - config.skipped
        # The patches without the class: (crops, 4 * side^2, width of the tower).
        x = self.tower.states(pixels, layers=layers, remat=remat)[:, 1:]
        side, inner = config.side, 4 * config.tower.width
        # Two by two patches are one row of (crops * side^2, inner).
        x = x.reshape(len(pixels), side, 2, side, 2, config.tower.width)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, inner)
        ends = (self.row_end[...], self.separator[...])
        parts = [end.reshape(1, inner).astype(x.dtype) for end in ends]
        x = jnp.concatenate([*parts, x])  # (2 + crops * side^2, inner)
        hidden = jax.nn.gelu(self.project_in(x), approximate=False)  # (rows, width)
        return self.project_out(hidden)

    def embed(
        self,
        tokens: Int[Array, "batch time"],
        pixels: Float[Array, "crops height width 3"] | None = None,
        sources: Int[Array, "batch time"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "batch time width"]:
        """The residual stream before the decoder's first layer.

        Args:
          tokens: integers (batch, time); below 0 for a part of a picture.
          pixels: views and crops of all pictures of the batch, or None.
          sources: row of `image_tokens` in each word's place, below 0 for none.
          remat: whether the gradient computes activations again; see `Decoder.states`.

        Returns:
          Floats (batch, time, width).

        Raises:
          ValueError: only one of pixels and sources is given.
        """
        x = self.decoder.embed(jnp.maximum(tokens, 0))  # (batch, time, width)
        if (pixels is None) != (sources is None):
            raise ValueError("Phi3Vision takes pixels and sources together, got one")
        if pixels is None or sources is None:
            return x
        image_tokens = self.image_tokens(pixels, remat=remat).astype(x.dtype)
        rows = image_tokens[jnp.maximum(sources, 0)]  # (batch, time, width)
        return jnp.where(sources[..., None] >= 0, rows, x)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        pixels: Float[Array, "crops height width 3"] | None = None,
        sources: Int[Array, "batch time"] | None = None,
        *,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits of the token that follows each token; arguments as for `embed`.

        Returns:
          Logits, float32 (batch, time, vocab_size), and with a cache (of all that came
          before, pictures too) the pair of the logits and the longer cache.
        """
        x = self.embed(tokens, pixels, sources)
        x, cache = self.decoder.states(x, cache=cache)
        logits = self.decoder.logits(x)
        return logits if cache is None else (logits, cache)
