"""Which sizes of a model config.json can say, by its model type.

A row is of an entry of config.json and of the parameters that have so many units. The
groups of `jp.axis_groups` with such a member lose some. Whether the entry then means
what the row says is checked by loading what was written. Where a head is as wide as the
width over the heads, config.json cannot say that there are fewer, so no row has them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    """An entry of config.json that holds a number of units.

    Attributes:
      unit: "neurons" or "heads".
      entry: name of the entry.
      globs: patterns on the names of the parameters that have the units.
    """

    unit: str
    entry: str
    globs: tuple[str, ...]


def _neurons(*globs: str, entry: str = "intermediate_size") -> Size:
    return Size("neurons", entry, globs)


_T5 = (
    _neurons(
        "*.DenseReluDense.wi.weight", "*.DenseReluDense.wi_0.weight", entry="d_ff"
    ),
    # d_kv says how wide a head is, whatever their number.
    Size("heads", "num_heads", ("*Attention.q.weight",)),
)
_ENCODER_DECODER = (
    _neurons("*encoder.layers.*.fc1.weight", entry="encoder_ffn_dim"),
    _neurons("*decoder.layers.*.fc1.weight", entry="decoder_ffn_dim"),
)
_BY_SIZES: dict[tuple[Size, ...], tuple[str, ...]] = {
    (_neurons("*layer.*.intermediate.dense.weight"),): (
        *("bert", "roberta", "xlm-roberta", "xmod", "camembert", "ernie", "electra"),
        *("deberta", "deberta-v2", "mpnet", "layoutlm", "splinter", "data2vec-text"),
        *("fnet", "nystromformer", "megatron-bert", "roformer", "rembert", "big_bird"),
        *("convbert", "yolos", "data2vec-vision"),
    ),
    (_neurons("*layers.*.mlp.fc1.weight"),): (
        *("vit", "deit", "beit", "ijepa", "vivit", "audio-spectrogram-transformer"),
        *("clip_vision_model", "clip_text_model"),
    ),
    # Its pooling is an attention with an MLP of the same width.
    (_neurons("*.mlp.fc1.weight"),): ("siglip_vision_model",),
    (_neurons("*layer*.mlp.up_proj.weight"),): (
        *("dinov3_vit", "gemma", "stablelm", "helium", "olmo", "exaone4", "ernie4_5"),
    ),
    (_neurons("*layers.*.mlp.down_proj.weight"),): ("glm",),
    (_neurons("*layers.*.mlp.dense_h_to_4h.weight"),): ("persimmon",),
    (_neurons("*albert_layers.*.ffn.weight"),): ("albert",),
    (_neurons("*transformer.layer.*.ffn.lin1.weight", entry="hidden_dim"),): (
        "distilbert",
    ),
    (_neurons("*.feed_forward.intermediate_dense.weight"),): (
        *("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "sew"),
        "data2vec-audio",
    ),
    _T5: ("t5", "mt5", "umt5", "longt5"),
    _ENCODER_DECODER: (
        *("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100", "plbart"),
        *("whisper", "speech_to_text"),
    ),
}
SIZES = {family: sizes for sizes, names in _BY_SIZES.items() for family in names}
"""The rows by `model_type`."""


def shrinkable_units(config: Mapping[str, Any]) -> list[str]:
    """What a directory of a model type can have fewer of.

    Args:
      config: content of its config.json.

    Returns:
      Some of "neurons" and "heads".
    """
    sizes = SIZES.get(str(config.get("model_type")), ())
    return list(dict.fromkeys(size.unit for size in sizes))
