"""CLIP's vision tower: a transformer in which each patch of an image attends to all.

Parameters are those of the published checkpoints, the last layers included that a user
of earlier features never runs.

Reference:
  Radford et al.: Learning Transferable Visual Models From Natural Language
  Supervision, 2021, arXiv 2103.00020. Dosovitskiy et al.: An Image is Worth 16x16
  Words, 2020, arXiv 2010.11929.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.lm.models.decoder.config import check_choice, check_positive
from jaxprune.lm.models.decoder.layers import Linear, Norm, attend

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


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
      norm_epsilon: what is added to the variance.
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
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    norm: ClassVar[Literal["layer"]] = "layer"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive(self, "image", "patch", "layers", "width", "heads", "mlp_width")
        for part, whole in (("patch", "image"), ("heads", "width")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"ClipConfig needs {whole} to be divisible by {part}, got "
                    f"{getattr(self, whole)} and {getattr(self, part)}"
                )
        check_choice(self, "activation", _ACTIVATIONS)

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.image // self.patch


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
        places = config.grid**2 + 1
        self.position_embedding = normal(places, width, deviation=width**-0.5)
        self.norm_embedded = Norm(config, width)
        self.layers = nnx.List(
            [ClipBlock(config, rngs=rngs) for _ in range(config.layers)]
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
        x = self.norm_embedded(self.embed(pixels))
        for layer in self.layers[:layers]:
            x = jax.checkpoint(layer)(x) if remat else layer(x)
        return x

    def __call__(
        self, pixels: Float[Array, "images height width 3"]
    ) -> Float[Array, "images features"]:
        """The normalised class of each image, CLIP's own feature of it."""
        return self.norm(self.states(pixels)[:, 0])


class ClipBlock(nnx.Module):
    """Normalise, attend to all, add; normalise, MLP, add."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        """Makes the layers; `rngs` is read, not kept."""

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(config, inputs, outputs, bias=True, rngs=rngs)

        width, wide = config.width, config.mlp_width
        self.norm_attention = Norm(config, width)
        self.q, self.k, self.v = (linear(width, width) for _ in range(3))
        self.out = linear(width, width)
        self.norm_mlp = Norm(config, width)
        self.up, self.down = linear(width, wide), linear(wide, width)
        self.config = config

    def __call__(
        self, x: Float[Array, "images positions features"]
    ) -> Float[Array, "images positions features"]:
        """Returns the residual stream after the block."""
        images, time, width = x.shape
        heads = self.config.heads
        y = self.norm_attention(x)
        q, k, v = (  # (images, positions, heads, width / heads)
            part(y).reshape(images, time, heads, -1)
            for part in (self.q, self.k, self.v)
        )
        every = jnp.ones((time, time), bool)  # each position sees each
        y = attend(q, k, v, every, (width // heads) ** -0.5)
        x = x + self.out(y.reshape(images, time, width))
        act = _ACTIVATIONS[self.config.activation]
        return x + self.down(act(self.up(self.norm_mlp(x))))
