"""SmolLM 3: Llama with some layers that know no positions."""

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=4, tied=True, theta=2e6)
    turning = _turning(a, fields["layers"])
    used, size = a.flag("use_sliding_window", False), family.window(a, None)
    size = size if used else None
    # Layers without positions slide where nothing else is said.
    default = [size is not None and not turns for turns in turning]
    sliding = family.sliding_layers(a, default)
    if any(sliding) and size is None:
        a.wrong("use_sliding_window", "true where layer_types slide", used)
    a.raw("max_window_layers")  # of the published files; not looked at
    return {
        **fields,
        **family.biased(a, mlp=True),
        "rope_of": tuple(0 if turns else None for turns in turning),
        "windows": tuple(size if slides else None for slides in sliding),
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


FAMILY = Family(
    _fields,
    family.modules(family.OUTER, family.LAYER),
    layer_attributes=_layer_attributes,
)
