"""What GGUF says of a model's shape, and what llama.cpp's own code assumes of it.

llama.cpp has a graph for each architecture, with constants of its own: where the norms
stand, which layers see a window. A shape that differs from them is refused, since the
file could be read and would give other logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.rules import Rule, check
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
    check(_FAMILY, model_type=model_type, known=known)
    architecture = ARCHITECTURES[model_type]
    used = [rope for i in range(config.layers) if (rope := config.rope(i)) is not None]
    plain = [r.switch is None and r.scale == 1 and not r.interleaved for r in used]
    gemma = architecture.name == "gemma3"
    full = [r for i, r in enumerate(used) if config.window(i) is None]
    local = [r for i, r in enumerate(used) if gemma and config.window(i) is not None]
    scale = config.attention_scale
    check(
        _RULES,
        name=architecture.name,
        ropes=len(used) == config.layers
        and all(plain)
        and len({*full}) <= 1
        and len({*local}) <= 1,
        rotated=all(2 * len(r.frequencies) == config.head_dim for r in used),
        factors=[x for r in full[:1] for x in np.unique(rope_factors(r)[1])],
        local_factors=[x for r in local[:1] for x in np.unique(rope_factors(r)[1])],
        by_factors=architecture.factors,
        windows=not gemma and any(config.windows),
        period=window_period(config.windows) if gemma else 0,
        full=[i for i in range(config.layers) if config.window(i) is None],
        activation=config.activation,
        usual_activation=architecture.activation,
        scale=scale,
        same_scale=scale is None or np.isclose(scale, config.head_dim**-0.5),
        biases=config.qkv_bias or config.out_bias or config.mlp_bias,
        may_have_biases=architecture.biases,
        head_bias=config.head_bias,
    )
    return architecture


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


_FAMILY = Rule(
    lambda v: v.model_type in ARCHITECTURES,
    "GGUF is written of model_type {known}, got {model_type}",
    "",
    "convert it with llama.cpp's convert_hf_to_gguf.py",
)
_RULES = (
    Rule(
        lambda v: v.ropes and v.rotated,
        "llama.cpp's {name} turns all features by one scheme for all contexts, which "
        "this model does not",
    ),
    Rule(
        lambda v: len(v.factors) <= 1 or v.by_factors,
        "llama.cpp's {name} stretches all rotary frequencies alike, which this model "
        "does not",
    ),
    Rule(
        lambda v: all(factor == 1 for factor in v.local_factors),
        "llama.cpp's {name} stretches no rotary frequencies of windows, which this "
        "model does",
    ),
    Rule(
        lambda v: not v.windows,
        "llama.cpp's {name} sees all tokens in all layers, but this model has windows",
    ),
    Rule(
        lambda v: v.period is not None,
        "llama.cpp's {name} has windows in all but each n-th layer, but this model has "
        "none in layers {full}",
        "remove layers so that it does",
    ),
    Rule(
        lambda v: v.activation == v.usual_activation,
        "llama.cpp's {name} has the nonlinearity {usual_activation}, but this model "
        "has {activation}",
    ),
    Rule(
        lambda v: v.same_scale,
        "llama.cpp's {name} scales scores by head_dim^(-1/2), but this model by "
        "{scale:g}",
    ),
    Rule(
        lambda v: not v.head_bias and (not v.biases or v.may_have_biases),
        "llama.cpp's {name} has no such biases, but this model has",
    ),
)
