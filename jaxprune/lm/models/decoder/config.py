"""The shape of a decoder-only transformer, general enough for all families here.

One dataclass says everything that the families differ in: what the norms are and where
they stand, which matrices are fused, where the biases are, how positions come in, how
far each layer sees. `jaxprune.lm.models.hf.families` makes one from a Hugging Face
config.json.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jaxprune.lm.models.decoder.rope import Rope

Norms = Literal[
    "layer", "layer_scale", "layer_plain", "rms", "rms_float32", "rms_plus_one"
]
"""The kinds of norms; `layers.Norm` says what each computes."""
Blocks = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]
"""Where the norms of a block stand; `DecoderConfig` says where."""
QueryNorms = Literal["head", "heads", "whole"]
"""What of the queries, and of the keys, is normalised together."""
Activations = Literal["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"]
"""The nonlinearities of an MLP."""


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields of a configuration that are no positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{type(config).__name__} needs {name} to be a positive integer, got "
                f"{value!r}"
            )


def check_choice(config: Any, name: str, choices: Collection[str | None]) -> None:
    """Refuses a field of a configuration that is none of these."""
    if getattr(config, name) not in choices:
        raise ValueError(
            f"{type(config).__name__} needs {name} to be one of "
            f"{', '.join(map(str, choices))}, "
            f"got {getattr(config, name)!r}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a `Decoder`; checked when it is made.

    Attributes:
      vocab_size: number of different tokens.
      context: the longest sequence, in tokens.
      layers: number of blocks.
      width: size of the residual stream.
      dtype: type of the matrix products, whatever the parameters' is.
      heads: query heads of a layer.
      kv_heads: key and value heads; each serves heads / kv_heads query heads.
      head_dim: features of a head.
      fused: whether q, k and v are one matrix, and gate and up another.
      fused_by_head: whether the fused q, k and v lie key head by key head: its queries,
        its key, its value; else all queries, all keys, all values.
      qkv_bias: whether the query, key and value products have a bias.
      out_bias: whether the attention's output product has a bias.
      qk_norm: norm of queries and keys: "head" by head with one scale for all, "heads"
        with a scale for each, or the "whole" of them; None for not.
      attention_scale: factor on the scores; None is head_dim^(-1/2).
      attention_softcap: c of c tanh(score / c); None for none.
      sinks: whether each head has a learned score that joins the softmax over the keys
        but has no value (attention sinks).
      mlp_width: features inside the MLP, or inside each expert.
      activation: the MLP's nonlinearity; "gelu" is exact.
      gated: whether the MLP is activation(gate) * up, else activation(up).
      mlp_bias: whether the MLP's products have a bias, the router's too.
      experts: number of MLPs that a router chooses from; 0 for one that all tokens
        take.
      experts_per_token: number of them that a token is sent to.
      renormalise: whether the router's shares of those are made to sum to 1.
      shared_width: features inside an MLP that all tokens take beside their experts; 0
        for none.
      experts_fused: whether gate and up of an expert are one kernel, their features
        alternating.
      swiglu_limit: clips gate from above and up on both sides; the MLP then computes
        (up + 1) * gate * sigmoid(swiglu_alpha * gate). None for activation(gate) * up.
      swiglu_alpha: the factor inside that sigmoid.
      norm: "layer", with scale and bias, "layer_scale", without the bias,
        "layer_plain", without both, "rms", "rms_float32", which rounds after it scales,
        or "rms_plus_one", scaled by 1 + w.
      norm_epsilon: number that is added to the variance.
      block: places of the norms: before attention and MLP ("pre"), behind them
        ("post"), or both ("sandwich"); "parallel" adds attention and MLP of the same
        input, each with a norm before it, "parallel_shared" with one norm for both.
      residual_scale: factor on what attention and MLP add.
      ropes: the rotary schemes; () for learned positions.
      rope_of: number in `ropes` of each layer, None for no positions at all; () for
        the first everywhere.
      position_offset: rows of the learned positions that come before the first's.
      windows: number of tokens that a token of each layer sees, itself included, None
        for all; () for all everywhere.
      tie_weights: whether the output head is the token embedding.
      embedding_scale: factor on the embedding.
      embedding_scale_rounded: whether that factor is rounded to `dtype` itself.
      head_bias: whether the output head has a bias.
      logit_scale: factor on the logits.
      logit_softcap: c of c tanh(logit / c); None for none.

    Raises:
      ValueError: a field is outside its range, or two do not fit.
    """

    # Sizes of the whole.
    vocab_size: int
    context: int
    layers: int
    width: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Attention.
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool = False
    fused_by_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QueryNorms | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    sinks: bool = False
    # The MLP of a block.
    mlp_width: int
    activation: Activations = "silu"
    gated: bool = True
    mlp_bias: bool = False
    # Experts in the place of an MLP.
    experts: int = 0
    experts_per_token: int = 0
    renormalise: bool = False
    shared_width: int = 0
    experts_fused: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    # Norms, and what is added to the residual stream.
    norm: Norms = "rms"
    norm_epsilon: float = 1e-6
    block: Blocks = "pre"
    residual_scale: float = 1.0
    # Positions, and how far a layer sees.
    ropes: tuple[Rope, ...] = ()
    rope_of: tuple[int | None, ...] = ()
    position_offset: int = 0
    windows: tuple[int | None, ...] = ()
    # Embedding and head.
    tie_weights: bool = False
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive(self, "vocab_size", "context", "layers", "width")
        check_positive(self, "heads", "kv_heads", "head_dim", "mlp_width")
        check_choice(self, "norm", get_args(Norms))
        check_choice(self, "qk_norm", (*get_args(QueryNorms), None))
        check_choice(self, "block", get_args(Blocks))
        check_choice(self, "activation", get_args(Activations))
        check_choice(self, "dtype", ("float32", "bfloat16"))
        if self.heads % self.kv_heads:
            raise ValueError(
                "DecoderConfig needs heads to be divisible by kv_heads, got "
                f"heads={self.heads} and kv_heads={self.kv_heads}"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                "DecoderConfig needs experts_per_token to be from 1 to "
                f"experts={self.experts}, got {self.experts_per_token}"
            )
        if self.experts and not self.gated:
            raise ValueError(
                "DecoderConfig has gated experts only, got gated=False and "
                f"experts={self.experts}; leave one of them out"
            )
        if not self.experts and self.swiglu_limit is not None:
            raise ValueError(
                "DecoderConfig clips experts only, got swiglu_limit="
                f"{self.swiglu_limit} and experts=0; leave swiglu_limit out"
            )
        for name in ("rope_of", "windows"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise ValueError(
                    f"DecoderConfig needs {name} to have one entry for each of the "
                    f"{self.layers} layers, got {len(getattr(self, name))}"
                )
        shortest = min((w for w in self.windows if w is not None), default=1)
        if shortest < 1:
            raise ValueError(
                f"DecoderConfig needs windows of at least 1 token, got {shortest}; "
                "None sees all"
            )

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "DecoderConfig":
        """The same shape with products of another type."""
        return dataclasses.replace(self, dtype=dtype)

    @property
    def embedding_factor(self) -> float:
        """The factor on the embedding, as it is multiplied by."""
        rounded = jnp.dtype(self.dtype if self.embedding_scale_rounded else float)
        return float(rounded.type(self.embedding_scale))

    @property
    def switches(self) -> tuple[int, ...]:
        """Lengths past which other rotary angles hold, for all positions, ascending."""
        lengths = {rope.switch for rope in self.ropes if rope.switch is not None}
        return tuple(sorted(lengths))

    def rope(self, layer: int) -> Rope | None:
        """The rotary scheme of a layer; None for learned positions, or for none."""
        if not self.ropes:
            return None
        index = self.rope_of[layer] if self.rope_of else 0
        return None if index is None else self.ropes[index]

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in a layer; None for all."""
        return self.windows[layer] if self.windows else None
