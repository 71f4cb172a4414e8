"""SmolLM 3: Llama with some layers that know no positions."""

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=4, tied=True, theta=2e6)
    turning = _turning(a, fields["layers"])
    a.raw("max_window_layers")  # of the published files; not looked at
    return {
        **fields,
        **family.biased(a, mlp=True),
        "rope_of": tuple(0 if turns else None for turns in turning),
        # Layers without positions slide where nothing else is said.
        "windows": family.switched(a, None, [not turns for turns in turning]),
    }


def _turning(a: Attributes, layers: int) -> list[bool]:
    """Which layers turn queries and keys by their positions."""
    interval = a.size("no_rope_layer_interval", 4)
    flags = a.raw("no_rope_layers")  # 1 where a layer does turn
    if flags is None:
        return [bool((i + 1) % interval) for i in range(layers)]
    if (
        not isinstance(flags, list)
        or len(flags) < layers
        or any(turns not in (0, 1) for turns in flags)
    ):
        a.wrong("no_rope_layers", f"a list of at least {layers} numbers 0 or 1", flags)
        return [True] * layers
    return [bool(turns) for turns in flags[:layers]]


def _layer_attributes(shape: DecoderConfig) -> Fields:
    turning = [int(shape.rope(i) is not None) for i in range(shape.layers)]
    return {**family.layer_types(shape), "no_rope_layers": turning}


FAMILY = Family(_fields, layer_attributes=_layer_attributes)
