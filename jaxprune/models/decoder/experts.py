"""A mixture of experts in the place of a block's MLP.

A router gives each token to a few of many MLPs, and what they answer is added up by the
router's shares. The rows that an expert is given lie together, so each of its matrices
meets them in one product (`jax.lax.ragged_dot`), and nothing is computed for the other
experts. Kernels are [experts, in, out].

References:
  Shazeer et al.: Outrageously Large Neural Networks: The Sparsely-Gated
  Mixture-of-Experts Layer, 2017, arXiv 1701.06538. Jiang et al.: Mixtral of Experts,
  2024, arXiv 2401.04088. Muennighoff et al.: OLMoE, 2024, arXiv 2409.02060.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.decoder.layers import ACTIVATIONS, MLP, Linear


class ExpertLinear(nnx.Module):
    """x @ kernel of the expert that a row belongs to; kernels [experts, in, out]."""

    def __init__(
        self, config: DecoderConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs
    ):
        """Makes the kernels; `rngs` is read, not kept."""
        shape = (config.experts, inputs, outputs)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.dtype = config.dtype

    def __call__(
        self, x: Float[Array, "rows inputs"], sizes: Int[Array, "experts"]
    ) -> Float[Array, "rows outputs"]:
        """The products of rows that lie expert by expert, `sizes` of each."""
        kernel = self.kernel[...].astype(self.dtype)
        return jax.lax.ragged_dot(x.astype(self.dtype), kernel, sizes)


class Experts(nnx.Module):
    """Some of many gated MLPs for each token, and one that all take where there is."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        width, wide = config.width, config.mlp_width
        self.router = Linear(config, width, config.experts, bias=False, rngs=rngs)
        self.gate = ExpertLinear(config, width, wide, rngs=rngs)
        self.up = ExpertLinear(config, width, wide, rngs=rngs)
        self.down = ExpertLinear(config, wide, width, rngs=rngs)
        self.experts, self.taken = config.experts, config.experts_per_token
        self.renormalise, self.activation = config.renormalise, config.activation
        self.sharing = config.shared_width > 0
        if self.sharing:
            self.shared = MLP(config, rngs=rngs, wide=config.shared_width)
            self.shared_router = Linear(config, width, 1, bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """Applies each token's experts to it."""
        rows = x.reshape(-1, x.shape[-1])  # (tokens, width)
        share, chosen = self.routed(rows)  # (tokens, taken)
        # Expert by expert, and within one in the order of the text.
        order = jnp.argsort(chosen.reshape(-1), stable=True)  # (tokens x taken,)
        token = order // self.taken
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts)  # (experts,)
        own = rows[token]  # (tokens x taken, width)
        gate, up = self.gate(own, sizes), self.up(own, sizes)
        y = self.down(ACTIVATIONS[self.activation](gate) * up, sizes)
        y = y * share.reshape(-1)[order][:, None].astype(y.dtype)
        y = jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)
        if not self.sharing:
            return y
        return y + jax.nn.sigmoid(self.shared_router(x)) * self.shared(x)

    def routed(
        self, rows: Float[Array, "tokens width"]
    ) -> tuple[Float[Array, "tokens taken"], Int[Array, "tokens taken"]]:
        """The shares of the experts that each token is given to, and their numbers."""
        logits = self.router(rows).astype(jnp.float32)  # (tokens, experts)
        share, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.taken)
        if self.renormalise:
            share = share / jnp.sum(share, axis=-1, keepdims=True)
        return share, chosen
