"""Weights on a few evenly spaced levels, zero among them: what int4 and int8 can hold.

Symmetric, by output and group of inputs: a weight is its level, an integer of at most
2^(bits - 1) - 1 either way, times the group's scale. Zero is a level, so what is pruned
stays zero. Scales have bfloat16's eight bits: a file holds them in two bytes.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.masking import patterns
from jaxprune.typing import Pattern

# Of the largest weight, that the highest level may stand for.
_SHARES = np.linspace(1, 0.6, 9, dtype=np.float32)

Name: TypeAlias = Literal["int4", "int8"]
"""The levels by the names that commands give them."""

BITS: dict[str, int] = {"int4": 4, "int8": 8}
"""Each name's number of bits."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The levels of a matrix, by output and group of inputs.

    Attributes:
      bits: number of bits of a level, 4 or 8.
      group: number of inputs that share a scale, a multiple of 16; the last group may
        be smaller.

    Raises:
      ValueError: a number does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.posttraining.solvers.quantization import Quantization
      >>> weight = jnp.array([[7.0], [2.2], [0.0], [-0.6]])
      >>> Quantization(bits=4).nearest(weight).ravel().tolist()
      [7.0, 2.0, 0.0, -1.0]

    Reference:
      The grid of Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training
      Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323,
      symmetric, with groups, its scales searched as their program's `mse` does. Ours
      differs: a scale has eight bits, as bfloat16.
    """

    bits: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        """Refuses what no file of ours holds."""
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.group < 16 or self.group % 16:
            raise ValueError(
                f"group must be a multiple of 16 inputs, got {self.group}; 128 is usual"
            )

    @property
    def most(self) -> int:
        """The highest level: 7 or 127."""
        return 2 ** (self.bits - 1) - 1

    def block(self, pattern: Pattern) -> int:
        """How many inputs a solver takes at once; refuses patterns without levels."""
        if isinstance(pattern, patterns.Block):
            raise ValueError(
                f"quantize takes Unstructured, PerOutput and NM, got {pattern}; leave "
                "quantize out, or take another pattern"
            )
        if isinstance(pattern, patterns.NM) and self.group % pattern.m:
            raise ValueError(
                f"the groups of quantize must be whole groups of {pattern}, got "
                f"{self.group} inputs; give a multiple of 16 and {pattern.m}"
            )
        return self.group

    def scale(self, weight: Float[Array, "group out"]) -> Float[Array, " out"]:
        """Each output's scale, of a group of inputs: that with the least squared error.

        Tried are the one whose highest level is the largest weight, and smaller ones,
        where that weight is cut down to the highest level.
        """
        largest = jnp.max(jnp.abs(weight), axis=0)  # (out,)

        def tried(share: jax.Array) -> tuple[jax.Array, jax.Array]:
            # `astype` there and back is a pair that XLA may leave out.
            scale = jax.lax.reduce_precision(largest * share / self.most, 8, 7)
            scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
            return scale, jnp.sum(
                jnp.square(weight - self.on(weight, scale[None])), axis=0
            )

        scales, errors = jax.lax.map(tried, jnp.asarray(_SHARES))  # (shares, out)
        best = jnp.argmin(errors, axis=0)[None]  # (1, out)
        return jnp.take_along_axis(scales, best, axis=0)[0]

    def on(
        self, weight: Float[Array, "*shape"], scale: Float[Array, "..."]
    ) -> Float[Array, "*shape"]:
        """Each weight at its nearest level of these scales."""
        level = jnp.clip(jnp.round(weight / scale), -self.most, self.most)
        # Not minus zero, which a file would take for a weight.
        return jnp.where(level == 0, jnp.zeros_like(level), level * scale)

    def nearest(self, weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Each weight at its nearest level; nothing makes up for the differences.

        Args:
          weight: (in, out), floating.

        Returns:
          The quantized weight, in its dtype.
        """
        inputs, outputs = weight.shape
        group = max(1, min(self.group, inputs))
        wide = jnp.pad(weight.astype(np.float32), ((0, -inputs % group), (0, 0)))
        groups = wide.reshape(-1, group, outputs)  # (groups, group, out)
        scales = jax.vmap(self.scale)(groups)[:, None]  # (groups, 1, out)
        on_levels = self.on(groups, scales).reshape(-1, outputs)
        return on_levels[:inputs].astype(weight.dtype)
