"""A mixture of experts in the place of a block's MLP.

A router sends each token to a few of many MLPs, and their outputs are added up with the
router's weights. The rows of an expert lie together, so each of its matrices
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
        counts: Int[Array, "experts"],
        expert: Int[Array, "rows"],
    ) -> Float[Array, "rows outputs"]:
        """The products of rows that lie expert by expert, `counts` of each."""
        kernel = self.kernel[...].astype(self.dtype)  # [experts, in, out]
        y = grouped_rows.dot(x.astype(self.dtype), kernel, counts)
        return y if self.bias is None else y + self.bias[...][expert].astype(y.dtype)


class Experts(nnx.Module):
    """Gated MLPs, some for each token, and one shared by all if the config says so."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes the matrices; `rngs` is read, not kept."""
        width, neurons, bias = config.width, config.mlp_width, config.mlp_bias
        self.router = Linear(config, width, config.experts, bias=bias, rngs=rngs)
        self.alternating = config.experts_fused
        if self.alternating:
            self.gate_up = ExpertLinear(config, width, 2 * neurons, rngs=rngs)
        else:
            self.gate = ExpertLinear(config, width, neurons, rngs=rngs)
            self.up = ExpertLinear(config, width, neurons, rngs=rngs)
        self.down = ExpertLinear(config, neurons, width, rngs=rngs)
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.experts, self.top_k = config.experts, config.experts_per_token
        self.renormalise, self.activation = config.renormalise, config.activation
        self.sharing = config.shared_width > 0
        if self.sharing:
            self.shared = MLP(config, rngs=rngs, neurons=config.shared_width)
            self.shared_router = Linear(config, width, 1, bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """Applies each token's experts to it."""
        sharding = placement.sharding_of(x)
        if sharding is None:
            return self._mixture(x)
        # Tokens of all devices are sorted by expert. No sharding type can describe the
        # result, so the axes of the mesh are Auto inside.
        graphdef, state = nnx.split(self)
        apply = jax.sharding.auto_axes(
            lambda state, x: nnx.merge(graphdef, state)._mixture(x),
            out_sharding=sharding,
        )
        return apply(state, x)

    def _mixture(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, width)
        token, _, y = self.expert_outputs(rows)
        y = jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)
        if not self.sharing:
            return y
        return y + jax.nn.sigmoid(self.shared_router(x)) * self.shared(x)

    def expert_outputs(
        self, rows: Float[Array, "tokens width"]
    ) -> tuple[Int[Array, "pairs"], Int[Array, "pairs"], Float[Array, "pairs width"]]:
        """Each expert's output for each token sent to it, times the router's weight.

        Returns three arrays with tokens x experts_per_token entries: the number of the
        token, the number of the expert, and the output. Entries are ordered by expert,
        and by token within an expert.
        """
        router_weights, chosen = self.route(rows)  # (tokens, top_k)
        order = jnp.argsort(chosen.reshape(-1), stable=True)  # (pairs,)
        token, expert = order // self.top_k, chosen.reshape(-1)[order]
        counts = jnp.bincount(chosen.reshape(-1), length=self.experts)  # (experts,)
        hidden = self._hidden(rows[token], counts, expert)  # (pairs, neurons)
        y = self.down(hidden, counts, expert)  # (pairs, width)
        y = y * router_weights.reshape(-1)[order][:, None].astype(y.dtype)
        return token, expert, y

    def _hidden(self, rows: Array, counts: Array, expert: Array) -> Array:
        """The neurons of each expert, which its `down` reads: (pairs, neurons)."""
        if self.alternating:
            gate_up = self.gate_up(rows, counts, expert)  # (pairs, 2 * neurons)
            gate, up = gate_up[:, ::2], gate_up[:, 1::2]  # features alternate
        else:
            gate, up = self.gate(rows, counts, expert), self.up(rows, counts, expert)
        if self.limit is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)  # gpt-oss

    def route(
        self, rows: Float[Array, "tokens width"]
    ) -> tuple[Float[Array, "tokens top_k"], Int[Array, "tokens top_k"]]:
        """The weights and the numbers of the experts that each token is sent to."""
        logits = self.router(rows).astype(jnp.float32)  # (tokens, experts)
        probabilities = jax.nn.softmax(logits, axis=-1)
        # (tokens, top_k)
        router_weights, chosen = jax.lax.top_k(probabilities, self.top_k)
        if self.renormalise:
            total = jnp.sum(router_weights, axis=-1, keepdims=True)  # (tokens, 1)
            router_weights = router_weights / total
        return router_weights, chosen
