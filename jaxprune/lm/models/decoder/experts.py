"""A mixture of experts in the place of a block's MLP.

A router gives each token to a few of many MLPs, and what they answer is added up by the
router's shares. The rows that an expert is given lie together, so each of its matrices
meets them in one product (`arrays.grouped_rows`). On one device nothing is computed for
the other experts; over a mesh it is `jax.lax.ragged_dot`. Kernels are
[experts, in, out].

References:
  Shazeer et al.: Outrageously Large Neural Networks: The Sparsely-Gated
  Mixture-of-Experts Layer, 2017, arXiv 1701.06538. Jiang et al.: Mixtral of Experts,
  2024, arXiv 2401.04088. Muennighoff et al.: OLMoE, 2024, arXiv 2409.02060.
  OpenAI: gpt-oss-120b & gpt-oss-20b Model Card, 2025, arXiv 2508.10925.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays import grouped_rows
from jaxprune.lm.models import placement
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.layers import ACTIVATIONS, MLP, Linear


class ExpertLinear(nnx.Module):
    """x @ kernel + bias of the expert of a row; kernels [experts, in, out]."""

    def __init__(
        self, config: DecoderConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs
    ):
        """Makes kernels and biases; `rngs` is read, not kept."""
        shape = (config.experts, inputs, outputs)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        biases = jnp.zeros((config.experts, outputs))
        self.bias = nnx.Param(biases) if config.mlp_bias else None
        self.dtype = config.dtype

    def __call__(
        self,
        x: Float[Array, "rows inputs"],
        sizes: Int[Array, "experts"],
        expert: Int[Array, "rows"],
    ) -> Float[Array, "rows outputs"]:
        """The products of rows that lie expert by expert, `sizes` of each."""
        kernel = self.kernel[...].astype(self.dtype)
        y = grouped_rows.dot(x.astype(self.dtype), kernel, sizes)
        return y if self.bias is None else y + self.bias[...][expert].astype(y.dtype)


class Experts(nnx.Module):
    """Gated MLPs, some for each token, and one shared by all if the config says so."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        width, wide = config.width, config.mlp_width
        bias = config.mlp_bias
        self.router = Linear(config, width, config.experts, bias=bias, rngs=rngs)
        self.alternating = config.experts_fused
        if self.alternating:
            self.gate_up = ExpertLinear(config, width, 2 * wide, rngs=rngs)
        else:
            self.gate = ExpertLinear(config, width, wide, rngs=rngs)
            self.up = ExpertLinear(config, width, wide, rngs=rngs)
        self.down = ExpertLinear(config, wide, width, rngs=rngs)
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
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
        where = placement.like(x)
        if where is None:
            return self._applied(x)
        # Tokens of all devices are sorted by expert. No sharding type can describe the
        # result, so the axes of the mesh are Auto inside.
        graphdef, state = nnx.split(self)
        apply = jax.sharding.auto_axes(
            lambda state, x: nnx.merge(graphdef, state)._applied(x), out_sharding=where
        )
        return apply(state, x)

    def _applied(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, width)
        token, _, y = self.answers(rows)
        y = jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)
        if not self.sharing:
            return y
        return y + jax.nn.sigmoid(self.shared_router(x)) * self.shared(x)

    def answers(
        self, rows: Float[Array, "tokens width"]
    ) -> tuple[Int[Array, "given"], Int[Array, "given"], Float[Array, "given width"]]:
        """Each expert's output for each token it is given, times the router's share.

        Returns three arrays with tokens x experts_per_token entries: the number of the
        token, the number of the expert, and the output. Entries are ordered by expert,
        and by token within an expert.
        """
        share, chosen = self.routed(rows)  # (tokens, taken)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token, expert = order // self.taken, chosen.reshape(-1)[order]
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts)  # (experts,)
        inside = self._inside(rows[token], sizes, expert)  # (given, wide)
        y = self.down(inside, sizes, expert)
        y = y * share.reshape(-1)[order][:, None].astype(y.dtype)
        return token, expert, y

    def _inside(self, own: Array, sizes: Array, expert: Array) -> Array:
        """What each expert's `down` reads."""
        if self.alternating:
            both = self.gate_up(own, sizes, expert)
            gate, up = both[:, ::2], both[:, 1::2]
        else:
            gate, up = self.gate(own, sizes, expert), self.up(own, sizes, expert)
        if self.limit is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)

    def routed(
        self, rows: Float[Array, "tokens width"]
    ) -> tuple[Float[Array, "tokens taken"], Int[Array, "tokens taken"]]:
        """The shares of the experts that each token is given to, and their numbers."""
        logits = self.router(rows).astype(jnp.float32)  # (tokens, experts)
        share, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.taken)
        if self.renormalise:
            share = share / jnp.sum(share, axis=-1, keepdims=True)
        return share, chosen
