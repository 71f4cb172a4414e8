"""The shape of a GPT, and what follows from the shape alone: sizes and operations.

Nothing here makes an array. Leaf names are those of `experiments.gpt.GPT`; counts
are exact Python integers.

Reference:
  Presets: Karpathy, nanoGPT (github.com/karpathy/nanoGPT, README.md and
  config/train_shakespeare_char.py), and Radford et al., Language Models are
  Unsupervised Multitask Learners (2019), table 2. "tiny" and "medium" are our own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxprune.arrays import rules
from jaxprune.arrays.rules import Rule
from jaxprune.lm.models.decoder.config import check_choice, check_positive

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "heads": 4, "width": 64, "context": 64},
    "cpu": {"layers": 4, "heads": 4, "width": 128, "context": 64},
    "medium": {"layers": 6, "heads": 6, "width": 192, "context": 128},
    "char": {"layers": 6, "heads": 6, "width": 384, "context": 256, "dropout": 0.2},
    "gpt2": {
        "layers": 12,
        "heads": 12,
        "width": 768,
        "context": 1024,
        "vocab_size": 50257,
        "bias": True,  # as published; the smaller ones follow nanoGPT and have none
        "gelu": "tanh",
    },
}
"""Sizes by name, as keyword arguments of `GPTConfig`; see `preset`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT; checked when it is made.

    Attributes:
      vocab_size: number of different tokens.
      context: the longest sequence, in tokens (learned positions).
      layers: number of blocks.
      heads: attention heads in each block; must divide `width`.
      width: size of the residual stream.
      dropout: share of activations dropped when a call is given a key, in [0, 1).
      bias: whether linear layers and normalisations have a bias (GPT-2: yes).
      tie_weights: whether the output head is the token embedding.
      gelu: "erf" (exact, nanoGPT) or "tanh" (GPT-2's approximation).
      dtype: type of the matrix products; parameters are float32 in any case.

    Raises:
      ValueError: a size is not a positive integer, `heads` does not divide
        `width`, or another field is outside its range.
    """

    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    bias: bool = False
    tie_weights: bool = True
    gelu: Literal["erf", "tanh"] = "erf"
    dtype: Literal["float32", "bfloat16"] = "float32"
    # No length past which other positions hold, which `generate` asks.
    switches: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive(self, "vocab_size", "context", "layers", "heads", "width")
        fitting = math.ceil(self.width / self.heads) * self.heads
        rules.check(_SHAPE, fitting=fitting, **vars(self))
        check_choice(self, "gelu", ("erf", "tanh"))
        check_choice(self, "dtype", ("float32", "bfloat16"))


def preset(name: str, **changes: Any) -> GPTConfig:
    """A configuration from `PRESETS`, with fields added or changed.

    Args:
      name: a key of `PRESETS`.
      **changes: fields of `GPTConfig`; all presets but "gpt2" need `vocab_size`.

    Returns:
      The configuration.

    Raises:
      ValueError: the name is unknown, or a field is outside its range.

    Example:
      >>> preset("cpu", vocab_size=65).width
      128
    """
    rules.check([_PRESET], name=name)
    return GPTConfig(**{**PRESETS[name], **changes})


def matrix_sizes(config: GPTConfig) -> dict[str, int]:
    """Number of weights of each matrix that a token is multiplied by.

    Args:
      config: the shape.

    Returns:
      Leaf name to in x out. The output head is the last one, by the name of its
      leaf ("token_embedding/embedding" when tied).

    Example:
      >>> sum(matrix_sizes(preset("cpu", vocab_size=65)).values())
      794752
    """
    # Weights in x out; biases and normalisations multiply no token by a matrix.
    square = config.width**2
    block = {
        "attention/qkv": 3 * square,
        "attention/out": square,
        "mlp/up": 4 * square,
        "mlp/down": 4 * square,
    }
    sizes = {
        f"blocks/{i}/{name}/kernel": size
        for i in range(config.layers)
        for name, size in block.items()
    }
    # Tied, the embedding is looked up at the input and multiplied at the output.
    head = "token_embedding/embedding" if config.tie_weights else "head/kernel"
    return {**sizes, head: config.width * config.vocab_size}


def flops_per_token(
    config: GPTConfig, sparsity: Mapping[str, float] | None = None
) -> int:
    """Floating-point operations of the forward pass for one token of a full context.

    2 in out for each matrix and 4 width context for each block's attention (the two
    products with all `context` keys, the masked half too, as nanoGPT counts).
    Normalisation, gelu, softmax and embedding look-ups are left out. These are the
    operations that are left in principle; no dense kernel skips zeros.

    Args:
      config: the shape.
      sparsity: leaf name to the share of it that is zero, in [0, 1]; a leaf not
        named counts in full.

    Returns:
      The number of operations.

    Raises:
      ValueError: a name is not one of `matrix_sizes`, or a share is not in [0, 1].

    Example:
      >>> flops_per_token(preset("cpu", vocab_size=65))
      1720576
    """
    sizes = matrix_sizes(config)
    sparsity = {} if sparsity is None else sparsity
    unknown = ", ".join(sorted(set(sparsity) - set(sizes)))
    if unknown:
        raise ValueError(
            f"sparsity names a matrix of the model, got {unknown}; "
            "matrix_sizes(config) lists them"
        )
    for name, share in sparsity.items():
        if not 0 <= share <= 1:
            raise ValueError(f"sparsity is a share in [0, 1], got {share} at {name!r}")
    # Rounded a leaf at a time, as the masks are.
    kept = sum(size - round(size * sparsity.get(n, 0.0)) for n, size in sizes.items())
    return 2 * kept + 4 * config.layers * config.width * config.context


_SHAPE = (
    Rule(
        lambda v: not v.width % v.heads,
        "GPTConfig needs width to be divisible by heads, got width={width} and "
        "heads={heads}",
        "take width={fitting}",
    ),
    Rule(
        lambda v: 0 <= v.dropout < 1,
        "GPTConfig needs dropout in [0, 1), got {dropout!r}",
        "0 switches it off",
    ),
)
_PRESET = Rule(
    lambda v: v.name in PRESETS,
    f"a preset is one of {', '.join(PRESETS)}, got {{name!r}}",
    "for another size make a GPTConfig",
)
