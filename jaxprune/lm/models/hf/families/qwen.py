"""Qwen 2 and 3: biases of q, k and v; the later one normalises q and k instead."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields_2(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=32)
    return {**fields, "qkv_bias": True, "windows": _windows(a, fields["layers"])}


def _fields_3(a: Attributes) -> Fields:
    fields = family.like_llama(a, head_dim=128, kv_heads=32)
    return {
        **fields,
        **family.biased(a),
        "qk_norm": "head",
        "windows": _windows(a, fields["layers"]),
    }


def _windows(a: Attributes, layers: int) -> tuple[int | None, ...]:
    """Windows from `max_window_layers` on, or by `layer_types`."""
    first = a.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        a.wrong("max_window_layers", "an integer >= 0", first)
        first = layers
    # The first layers see all.
    return family.switched(a, 4096, [i >= first for i in range(layers)])


QWEN2 = Family(_fields_2)
QWEN3 = Family(_fields_3)
