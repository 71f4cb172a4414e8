"""Which sizes of a model config.json can say, by its model type.

A row is of an entry of config.json and of the groups of `jp.axis_groups` that have so
many units: those with a member that a glob matches. Whether an entry means what the row
says is checked by loading what was written. Where heads are as wide as the width over
their number, config.json cannot say that there are fewer: no row has them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    """An entry of config.json that holds a number of units.

    Attributes:
      unit: "neurons" or "heads".
      entry: name of the entry.
      glob: pattern on the names of the parameters that have the units.
    """

    unit: str
    entry: str
    glob: str


def _neurons(entry: str, *globs: str) -> tuple[Size, ...]:
    return tuple(Size("neurons", entry, glob) for glob in globs)


def _heads(entry: str, *globs: str) -> tuple[Size, ...]:
    return tuple(Size("heads", entry, glob) for glob in globs)


_BERT = _neurons("intermediate_size", "*layer.*.intermediate.dense.weight")
_T5 = (
    *_neurons("d_ff", "*DenseReluDense.wi.weight", "*DenseReluDense.wi_0.weight"),
    *_heads("num_heads", "*Attention.q.weight"),
)
_FFN = (
    *_neurons("encoder_ffn_dim", "*encoder.layers.*.fc1.weight"),
    *_neurons("decoder_ffn_dim", "*decoder.layers.*.fc1.weight"),
)
_WAV = _neurons(
    "intermediate_size", "*encoder.layers.*.feed_forward.intermediate_dense.weight"
)
_FC1 = _neurons("intermediate_size", "*layers.*.mlp.fc1.weight")
_GATED = _neurons("intermediate_size", "*layers.*.mlp.up_proj.weight")

SIZES: dict[str, tuple[Size, ...]] = {
    **dict.fromkeys(
        (
            *("bert", "roberta", "xlm-roberta", "electra", "camembert", "ernie"),
            *("deberta-v2", "deberta", "mpnet", "layoutlm", "splinter", "nezha"),
            *("deit", "beit", "data2vec-text", "audio-spectrogram-transformer"),
        ),
        _BERT,
    ),
    "vit": (*_BERT, *_FC1),
    "dinov2": _neurons("mlp_ratio_neurons", "*.mlp.fc1.weight")[:0],
    "distilbert": _neurons("hidden_dim", "*transformer.layer.*.ffn.lin1.weight"),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "longt5": _T5,
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot"), _FFN),
    **dict.fromkeys(("whisper", "m2m_100", "speech_to_text", "plbart"), _FFN),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), _WAV),
    **dict.fromkeys(
        ("clip_vision_model", "siglip_vision_model", "clip_text_model"), _FC1
    ),
    **dict.fromkeys(("modernbert",), ()),
    **dict.fromkeys(("gemma", "glm", "qwen3_next", "ministral"), _GATED),
}
"""The entries by `model_type`."""


def shrinkable_units(config: Mapping[str, Any]) -> list[str]:
    """What a directory of a model type can have fewer of.

    Args:
      config: content of its config.json.

    Returns:
      Some of "neurons" and "heads".
    """
    sizes = SIZES.get(str(config.get("model_type")), ())
    return list(dict.fromkeys(size.unit for size in sizes if size.entry in config))
