"""What GGUF says of a model's shape, and what llama.cpp's own code assumes of it.

llama.cpp has a graph for each architecture, with constants of its own: where the norms
stand, which layers see a window. A shape that differs from them is refused, since the
file could be read and would give other logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.rules import refusal
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.rope import Rope


class Architecture(NamedTuple):
    """A graph of llama.cpp.

    Attributes:
      name: its name in GGUF.
      permuted: whether queries and keys turn neighbours, where a directory turns
        features of two halves.
      plus_one: number that is added to each norm's scale.
      biases: whether its products may have biases.
      factors: whether a tensor may divide each rotary frequency.
      activation: nonlinearity of its MLP.
    """

    name: str
    permuted: bool = False
    plus_one: float = 0.0
    biases: bool = False
    factors: bool = False
    activation: str = "silu"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True, biases=True, factors=True),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", plus_one=1.0, activation="gelu_tanh"),
}
"""By model_type of config.json."""


def check_shape(model_type: str, config: DecoderConfig) -> Architecture:
    """The graph that computes what a model does.

    Args:
      model_type: family, as config.json names it.
      config: shape of the model.

    Returns:
      The architecture.

    Raises:
      ValueError: llama.cpp has none, or its constants are others.
    """
    known = ", ".join(ARCHITECTURES)
    if model_type not in ARCHITECTURES:
        raise refusal(
            f"GGUF is written of model_type {known}, got {model_type}",
            "",
            "convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    architecture = ARCHITECTURES[model_type]
    _check_ropes(architecture, config)
    scale = config.attention_scale
    gemma = architecture.name == "gemma3"
    if not gemma and any(config.windows):
        raise ValueError(
            f"llama.cpp's {architecture.name} sees all tokens in all layers, but this "
            "model has windows"
        )
    if gemma and window_period(config.windows) is None:
        raise ValueError(
            f"llama.cpp's {architecture.name} has windows in all but each n-th layer, "
            "but this model has none in layers "
            f"{[i for i in range(config.layers) if config.window(i) is None]}; remove "
            "layers so that it does"
        )
    if config.activation != architecture.activation:
        raise ValueError(
            f"llama.cpp's {architecture.name} has the nonlinearity "
            f"{architecture.activation}, but this model has {config.activation}"
        )
    if scale is not None and not np.isclose(scale, config.head_dim ** (-0.5)):
        raise ValueError(
            f"llama.cpp's {architecture.name} scales scores by head_dim^(-1/2), but "
            f"this model by {scale:g}"
        )
    if config.head_bias or (
        (config.qkv_bias or config.out_bias or config.mlp_bias)
        and not architecture.biases
    ):
        raise ValueError(
            f"llama.cpp's {architecture.name} has no such biases, but this model has"
        )
    return architecture


def _check_ropes(architecture: Architecture, config: DecoderConfig) -> None:
    """Refuses rotary schemes that the graph does not compute."""
    used = [rope for i in range(config.layers) if (rope := config.rope(i)) is not None]
    gemma = architecture.name == "gemma3"
    full = {r for i, r in enumerate(used) if config.window(i) is None}
    local = {r for i, r in enumerate(used) if gemma and config.window(i) is not None}
    if (
        len(used) < config.layers
        or any(r.switch is not None or r.scale != 1 or r.interleaved for r in used)
        or any(2 * len(r.frequencies) != config.head_dim for r in used)
        or max(len(full), len(local)) > 1
    ):
        raise ValueError(
            f"llama.cpp's {architecture.name} turns all features by one scheme for all "
            "contexts, which this model does not"
        )
    uneven = any(len({*rope_factors(r)[1].tolist()}) > 1 for r in full)
    if uneven and not architecture.factors:
        raise ValueError(
            f"llama.cpp's {architecture.name} stretches all rotary frequencies alike, "
            "which this model does not"
        )
    if any((rope_factors(r)[1] != 1).any() for r in local):
        raise ValueError(
            f"llama.cpp's {architecture.name} stretches no rotary frequencies of "
            "windows, which this model does"
        )


def window_period(windows: Sequence[int | None]) -> int | None:
    """In how many layers the one without a window comes again.

    Args:
      windows: window of each layer, None for all tokens.

    Returns:
      n where all layers but each n-th have windows, 0 where all have, None otherwise.

    Example:
      >>> window_period([512, 512, None, 512, 512, None])
      3
    """
    # 6 first: older releases of llama.cpp know no other.
    for period in (6, *range(len(windows) + 1)):
        if all(
            (window is not None) == (period == 0 or i % period < period - 1)
            for i, window in enumerate(windows)
        ):
            return period
    return None


def rope_factors(rope: Rope) -> tuple[float, np.ndarray]:
    """The base of a rotary scheme, and what each of its frequencies is divided by.

    Args:
      rope: scheme of n pairs.

    Returns:
      theta and float32 (n,): frequency i is theta^(-i / n) / factor i.

    Example:
      >>> from jaxprune.lm.models.decoder.rope import linear
      >>> theta, factors = rope_factors(linear(1e4, 8, factor=2.0))
      >>> round(theta), factors.tolist()
      (10000, [2.0, 2.0, 2.0, 2.0])
    """
    frequencies = np.array(rope.frequencies, np.float64)
    pairs = len(frequencies)
    # Schemes that stretch a context leave the fastest frequencies alone, or all alike.
    theta = (frequencies[0] / frequencies[1]) ** pairs if pairs > 1 else 1e4
    plain = theta ** (-np.arange(pairs) / pairs)
    return float(theta), np.round(plain / frequencies, 6).astype(np.float32)


def write_shape(writer: Any, architecture: Architecture, config: DecoderConfig) -> None:
    """Writes the keys of a shape.

    Args:
      writer: the `gguf.GGUFWriter`.
      architecture: graph that reads them.
      config: shape of the model.
    """
    import gguf

    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    # Said in any case: a model that lost heads has not width / heads features each.
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    windows = [config.window(i) for i in range(config.layers)]
    full = next((i for i, window in enumerate(windows) if window is None), 0)
    # One for each layer, as was checked.
    ropes = [r for i in range(config.layers) if (r := config.rope(i)) is not None]
    theta, factors = rope_factors(ropes[full])
    writer.add_rope_freq_base(theta)
    if len({*factors.tolist()}) == 1 and factors[0] != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(factors[0]))
    if architecture.name == "gemma3" and (local := [w for w in windows if w]):
        writer.add_sliding_window(local[0])
        # A number: llama.cpp passes over an array, and takes 6.
        writer.add_sliding_window_pattern(window_period(windows))
        theta, _ = rope_factors(ropes[windows.index(local[0])])
        writer.add_rope_freq_base_swa(theta)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
