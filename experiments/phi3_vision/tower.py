"""CLIP's vision tower: a transformer in which each patch of an image attends to all.

Its blocks are the decoder's, with a mask that hides nothing. Parameters are those of
the published checkpoints, the last layers included that a user of earlier features
never runs.

Reference:
  Radford et al.: Learning Transferable Visual Models From Natural Language
  Supervision, 2021, arXiv 2103.00020. Dosovitskiy et al.: An Image is Worth 16x16
  Words, 2020, arXiv 2010.11929.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.lm.models.decoder.block import Block
from jaxprune.lm.models.decoder.config import (
    DecoderConfig,
    check_choice,
    check_positive,
)
from jaxprune.lm.models.decoder.layers import Norm

ClipActivations = Literal["quick_gelu", "gelu"]
"""The nonlinearities of CLIP's MLP; "gelu" is exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The shape of a `ClipTower`; checked when it is made. Defaults are ViT-L/14-336's.

    Attributes:
      image: height and width of an image, in pixels.
      patch: height and width of a patch.
      layers: number of blocks.
      width: size of the residual stream.
      heads: heads of a layer.
      mlp_width: features inside the MLP.
      activation: the MLP's nonlinearity; "gelu" is exact.
      norm_epsilon: number that is added to the variance.
      dtype: type of the products, whatever the parameters' is.

    Raises:
      ValueError: a field is outside its range, or two do not fit.
    """

    image: int = 336
    patch: int = 14
    layers: int = 24
    width: int = 1024
    heads: int = 16
    mlp_width: int = 4096
    activation: ClipActivations = "quick_gelu"
    norm_epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    norm: ClassVar[Literal["layer"]] = "layer"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive(self, "image", "patch", "layers", "width", "heads", "mlp_width")
        for divisor, dividend in (("patch", "image"), ("heads", "width")):
            if getattr(self, dividend) % getattr(self, divisor):
                raise ValueError(
                    f"ClipConfig needs {dividend} to be divisible by {divisor}, got "
                    f"{getattr(self, dividend)} and {getattr(self, divisor)}"
                )
        check_choice(self, "activation", get_args(ClipActivations))

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.image // self.patch

    @property
    def blocks(self) -> DecoderConfig:
        """The shape of the blocks, as that of a decoder with learned positions."""
        return DecoderConfig(
            vocab_size=1,  # not read
            context=self.grid**2 + 1,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            dtype=self.dtype,
        )


class ClipTower(nnx.Module):
    """The tower of a shape; `rngs` gives the keys of the initial parameters.

    Example:
      >>> config = ClipConfig(
      ...     image=8, patch=4, layers=1, width=8, heads=2, mlp_width=16
      ... )
      >>> tower = ClipTower(config, rngs=nnx.Rngs(0))
      >>> tower.states(jnp.zeros((3, 8, 8, 3)), layers=1).shape
      (3, 5, 8)
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, float32 and normal.

        Class and positions have deviation width^-1/2, as in CLIP's own code: with less
        the position is lost in the patch. All else has 0.02.
        """
        self.config = config
        width, patch = config.width, config.patch

        def normal(*shape: int, deviation: float) -> nnx.Param:
            return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))

        self.class_embedding = normal(width, deviation=width**-0.5)
        # [columns, rows, channels, out]: torch's axes reversed.
        self.patch_embedding = normal(patch, patch, 3, width, deviation=0.02)
        positions = config.grid**2 + 1  # the class and the patches
        self.position_embedding = normal(positions, width, deviation=width**-0.5)
        self.norm_embedded = Norm(config, width)
        self.layers = nnx.List(
            [Block(config.blocks, i, rngs=rngs) for i in range(config.layers)]
        )
        self.norm = Norm(config, width)

    def embed(
        self, pixels: Float[Array, "images height width 3"]
    ) -> Float[Array, "images positions features"]:
        """The class and the patches, row by row, with their positions added."""
        config = self.config
        images, height, width, _ = pixels.shape
        if (height, width) != (config.image, config.image):
            raise ValueError(
                f"ClipTower needs images of {config.image} x {config.image} pixels, "
                f"got {height} x {width}"
            )
        grid, patch = config.grid, config.patch
        # Rows are patches, features their pixels: (images, grid^2, patch^2 * 3).
        x = pixels.astype(config.dtype).reshape(images, grid, patch, grid, patch, 3)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(images, grid**2, -1)
        kernel = self.patch_embedding[...].astype(config.dtype)
        x = x @ kernel.reshape(-1, config.width)  # (images, grid^2, width)
        first = self.class_embedding[...].astype(config.dtype)
        first = jnp.broadcast_to(first, (images, 1, config.width))
        x = jnp.concatenate([first, x], axis=1)  # (images, grid^2 + 1, width)
        return x + self.position_embedding[...].astype(config.dtype)[None]

    def states(
        self,
        pixels: Float[Array, "images height width 3"],
        *,
        layers: int | None = None,
        remat: bool = False,
    ) -> Float[Array, "images positions features"]:
        """The residual stream after `layers` layers (all by default), not normalised.

        Returns:
          The class first, then the patches row by row: (images, grid^2 + 1, width).
        """
        x = self.norm_embedded(self.embed(pixels))  # (images, positions, width)
        positions = x.shape[1]
        mask = jnp.ones((positions, positions), bool)  # nothing is causal in a picture
        for layer in self.layers[:layers]:
            run = jax.checkpoint(layer) if remat else layer
            x, _ = run(x, None, mask, None, jnp.int32(0))
        return x

    def __call__(
        self, pixels: Float[Array, "images height width 3"]
    ) -> Float[Array, "images features"]:
        """The normalised class of each image, CLIP's own feature of it."""
        return self.norm(self.states(pixels)[:, 0])
