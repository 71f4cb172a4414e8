"""The shape of a decoder-only transformer, general enough for seven families.

One dataclass says everything that the families differ in: what the norms are, which
matrices are fused, where the biases are, how positions come in, how far each layer
sees. `jaxprune.models.hf.families` makes one from a Hugging Face config.json.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

from jaxprune.models.decoder.rope import Rope


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields of a configuration that are no positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{type(config).__name__} needs {name} to be a positive integer, got "
                f"{value!r}"
            )


def check_choice(config: Any, name: str, known: Collection[str]) -> None:
    """Refuses a field of a configuration that is none of these."""
    if getattr(config, name) not in known:
        raise ValueError(
            f"{type(config).__name__} needs {name} to be one of {', '.join(known)}, "
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
      heads: query heads of a layer.
      kv_heads: key and value heads; each serves heads / kv_heads query heads.
      head_dim: features of a head.
      mlp_width: features inside the MLP.
      norm: "layer" (with bias), "rms", or "rms_plus_one" (scaled by 1 + w).
      norm_epsilon: what is added to the variance.
      qk_norm: whether queries and keys are normalised, head by head.
      post_norms: whether what a block adds is normalised too.
      activation: the MLP's nonlinearity; "gelu" is exact.
      gated: whether the MLP is activation(gate) * up, else activation(up).
      fused: whether q, k and v are one matrix, and gate and up another.
      qkv_bias: whether the query, key and value products have a bias.
      out_bias: whether the attention's output product has one.
      mlp_bias: whether the MLP's products have one.
      tie_weights: whether the output head is the token embedding.
      embedding_scale: factor on the embedding, rounded to `dtype`.
      attention_scale: factor on the scores; None is head_dim^(-1/2).
      logit_softcap: c of c tanh(logit / c); None for none.
      ropes: the rotary schemes; () for learned positions.
      rope_of: for each layer, which of `ropes`; () for the first everywhere.
      windows: for each layer, how many tokens a token sees, itself included, None for
        all; () for all everywhere.
      dtype: type of the matrix products, whatever the parameters' is.

    Raises:
      ValueError: a field is outside its range, or two do not fit.
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Literal["layer", "rms", "rms_plus_one"] = "rms"
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_weights: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_softcap: float | None = None
    ropes: tuple[Rope, ...] = ()
    rope_of: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive(self, "vocab_size", "context", "layers", "width")
        check_positive(self, "heads", "kv_heads", "head_dim", "mlp_width")
        if self.heads % self.kv_heads:
            raise ValueError(
                "DecoderConfig needs heads to be divisible by kv_heads, got heads="
                f"{self.heads} and kv_heads={self.kv_heads}"
            )
        check_choice(self, "norm", ("layer", "rms", "rms_plus_one"))
        check_choice(self, "activation", ("silu", "gelu", "gelu_tanh"))
        check_choice(self, "dtype", ("float32", "bfloat16"))
        self._layerwise()

    def with_dtype(self, dtype: Literal["float32", "bfloat16"]) -> "DecoderConfig":
        """The same shape with products of another type."""
        return dataclasses.replace(self, dtype=dtype)

    @property
    def switches(self) -> tuple[int, ...]:
        """Lengths past which other rotary angles hold, for all positions, ascending."""
        found = {rope.switch for rope in self.ropes if rope.switch is not None}
        return tuple(sorted(found))

    def rope(self, layer: int) -> Rope | None:
        """The rotary scheme of a layer; None for learned positions."""
        if not self.ropes:
            return None
        return self.ropes[self.rope_of[layer] if self.rope_of else 0]

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in a layer; None for all."""
        return self.windows[layer] if self.windows else None

    def _layerwise(self) -> None:
        for name in ("rope_of", "windows"):
            given = len(getattr(self, name))
            if given not in (0, self.layers):
                raise ValueError(
                    f"DecoderConfig needs {name} to have one entry for each of the "
                    f"{self.layers} layers, got {given}"
                )
        if wrong := [w for w in self.windows if w is not None and w < 1]:
            raise ValueError(
                f"DecoderConfig needs windows of at least 1 token, got {wrong[0]}; "
                "None sees all"
            )
        if wrong := [i for i in self.rope_of if not 0 <= i < len(self.ropes)]:
            raise ValueError(
                f"DecoderConfig needs rope_of to index the {len(self.ropes)} ropes, "
                f"got {wrong[0]}"
            )
        for rope in self.ropes:
            if 2 * len(rope.frequencies) > self.head_dim:
                raise ValueError(
                    "DecoderConfig needs at most head_dim / 2 rotary frequencies, got "
                    f"{len(rope.frequencies)} for head_dim={self.head_dim}"
                )
