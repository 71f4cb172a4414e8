"""What the trainers' own decoders assume of a model: Llama, Qwen 3 and Gemma 3.

MaxText and Tunix have one module for each family, with constants of their own. A shape
that differs from them is refused, since its weights would load and give other logits.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.export.gguf_shape import rope_factors
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.rope import Rope

FAMILIES = ("llama", "qwen3", "gemma3_text")
"""By model_type of config.json."""
_PERIOD = 6  # every sixth layer of a Gemma 3 sees all tokens


class RopeShape(NamedTuple):
    """A rotary scheme whose frequencies are all stretched alike.

    Attributes:
      theta: base of the frequencies.
      factor: number that each of them is divided by.
    """

    theta: float
    factor: float


class TrainerShape(NamedTuple):
    """What a trainer's configuration says beside the sizes.

    Attributes:
      rope: rotary scheme of the layers that see all tokens.
      local_rope: that of the layers with a window, or None.
      window: number of tokens that these see, or None.
    """

    rope: RopeShape
    local_rope: RopeShape | None = None
    window: int | None = None


def check_trainer_shape(
    model_type: str, config: DecoderConfig, trainer: str
) -> TrainerShape:
    """The shape of a model that a trainer's own decoder computes.

    Args:
      model_type: family, as config.json names it.
      config: shape of the model.
      trainer: name of the trainer, for errors.

    Returns:
      The rotary schemes and the window.

    Raises:
      ValueError: the trainer's decoder computes something else.
    """
    check(_FAMILY, model_type=model_type, trainer=trainer, known=", ".join(FAMILIES))
    gemma = model_type == "gemma3_text"
    ropes = [config.rope(i) for i in range(config.layers)]
    windows = [config.window(i) for i in range(config.layers)]
    full = [i % _PERIOD == _PERIOD - 1 for i in range(config.layers)]
    # Schemes and windows layer by layer: (layers,) each.
    shapes = [_rope_shape(rope, config.head_dim) for rope in ropes]
    activation = "gelu_tanh" if gemma else "silu"
    # Of one kind where no layer has the other.
    whole = {shape for shape, w in zip(shapes, windows, strict=True) if w is None}
    local = {shape for shape, w in zip(shapes, windows, strict=True) if w is not None}
    check(
        _RULES,
        trainer=trainer,
        ropes=None not in shapes and len(whole) <= 1 and len(local) <= 1,
        local_factor=max((s.factor for s in local if s), default=1.0),
        stretched=not gemma and any(s and s.factor != 1 for s in whole),
        periodic=[w is None for w in windows] == (full if gemma else [True] * len(full))
        and len({*windows} - {None}) <= 1,
        activation=config.activation,
        usual_activation=activation,
        scale=config.attention_scale,
        same_scale=config.attention_scale is None
        or math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6),
        biases=config.qkv_bias
        or config.out_bias
        or config.mlp_bias
        or config.head_bias,
        capped=config.logit_softcap is not None or config.attention_softcap is not None,
    )
    # Each layer has a scheme, as was checked.
    first = next(shape for shape in (*whole, *local) if shape is not None)
    window = next((w for w in windows if w), None)
    return TrainerShape(first, next(iter(local), None), window)


def _rope_shape(rope: Rope | None, head_dim: int) -> RopeShape | None:
    """A scheme of two halves for all contexts, or None for another."""
    if rope is None or rope.switch is not None or rope.scale != 1 or rope.interleaved:
        return None
    theta, factors = rope_factors(rope)  # (pairs,) factors
    if 2 * len(rope.frequencies) != head_dim or len(np.unique(factors)) > 1:
        return None
    return RopeShape(round(theta, 2), float(factors[0]))


_FAMILY = Rule(
    lambda v: v.model_type in FAMILIES,
    "{trainer} is handed model_type {known}, got {model_type}",
)
_RULES = (
    Rule(
        lambda v: v.ropes,
        "{trainer}'s decoder turns all features of a head by one scheme for all "
        "contexts, stretched alike, which this model does not",
    ),
    Rule(
        lambda v: not v.stretched and v.local_factor == 1,
        "{trainer}'s decoder stretches no rotary frequencies here, which this model "
        "does",
    ),
    Rule(
        lambda v: v.periodic,
        "{trainer}'s decoder has one window in all but each sixth layer of a Gemma 3 "
        "and none elsewhere, but this model has others",
        "remove whole periods of layers, or none",
    ),
    Rule(
        lambda v: v.activation == v.usual_activation,
        "{trainer}'s decoder has the nonlinearity {usual_activation}, but this model "
        "has {activation}",
    ),
    Rule(
        lambda v: v.same_scale,
        "{trainer}'s decoder scales scores by head_dim^(-1/2), but this model by "
        "{scale:g}",
    ),
    Rule(
        lambda v: not v.biases,
        "{trainer}'s decoder has no such biases, but this model has",
    ),
    Rule(
        lambda v: not v.capped,
        "{trainer}'s decoder has no cap on logits or scores, but this model has",
    ),
)
