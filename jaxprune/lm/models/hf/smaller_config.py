"""What config.json says of a smaller model.

A configuration that would not be read back as the shape of the parameters is refused,
and so is one that transformers does not take.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf import families


def smaller_config(
    config: Mapping[str, Any],
    shape: DecoderConfig,
    kept: Sequence[int] | None = None,
    *,
    ignore_config: Sequence[str] = (),
) -> dict[str, Any]:
    """The config.json of a smaller decoder.

    Args:
      config: content of the config.json of the model before.
      shape: smaller shape.
      kept: numbers of the layers that stayed, all if left out.
      ignore_config: attributes that `load` was told to read as if they were not there.

    Returns:
      The parsed file, changed.

    Raises:
      ValueError: the family's config.json cannot say this shape, or transformers would
        refuse it.

    Example:
      >>> before = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4,
      ...           "n_embd": 2, "n_layer": 3, "n_head": 1}
      >>> shape = families.decoder_config(before)
      >>> shape = dataclasses.replace(shape, mlp_width=6, layers=1)
      >>> smaller_config(before, shape, [2])
      {'model_type': 'gpt2', 'vocab_size': 5, 'n_positions': 4, 'n_embd': 2, \
'n_layer': 1, 'n_head': 1, 'n_inner': 6}
    """
    shape_before = families.decoder_config(config, ignore_config=ignore_config)
    kept = range(shape_before.layers) if kept is None else kept
    new = dict(config)
    resized = families.find_family(config).resized
    # Every family that can lose tokens has their number under one name.
    for field, name in {**resized, "vocab_size": "vocab_size"}.items():
        size = getattr(shape, field)
        if size != getattr(shape_before, field) or field == "head_dim":
            new |= {twin: size for twin in families.TWINS.get(name, ()) if twin in new}
            new[name] = size
    if len(kept) != shape_before.layers:
        new |= _layerwise(config, shape, kept)
    try:
        # What is written must be read as the shape of the parameters.
        read_back = families.decoder_config(new, ignore_config=ignore_config)
    except ValueError as error:
        raise ValueError(_cannot_say(config, str(error))) from None
    if read_back != shape.with_dtype(read_back.dtype):
        fields = [f.name for f in dataclasses.fields(read_back)]
        wrong = [f for f in fields if getattr(read_back, f) != getattr(shape, f)]
        raise ValueError(_cannot_say(config, f"it would change {', '.join(wrong)}"))
    fit = heads_that_fit(config, shape_before)
    # What the model was before, it may stay.
    if shape.heads not in (*fit, shape_before.heads):
        fewer = " or ".join(str(n) for n in fit if n < shape_before.heads)
        raise ValueError(
            f"transformers takes a {config['model_type']} model only where "
            f"{when_heads_fit(config, shape)}, got {shape.heads}; leave "
            f"{fewer or 'all of them'}"
        )
    return new


def heads_that_fit(config: Mapping[str, Any], shape: DecoderConfig) -> list[int]:
    """The numbers of query heads that transformers takes for a width, ascending.

    Args:
      config: content of the config.json.
      shape: shape of the model.

    Returns:
      Numbers up to that of the shape, without those that the family's class in
      transformers refuses.

    Example:
      >>> config = {"model_type": "llama", "vocab_size": 5, "hidden_size": 12,
      ...           "intermediate_size": 6, "num_hidden_layers": 1,
      ...           "num_attention_heads": 6, "max_position_embeddings": 4}
      >>> heads_that_fit(config, families.decoder_config(config))
      [1, 2, 3, 4, 6]
    """
    rule = families.find_family(config).heads
    numbers = range(1, shape.heads + 1)
    return [heads for heads in numbers if rule.takes(config, shape.width, heads)]


def when_heads_fit(config: Mapping[str, Any], shape: DecoderConfig) -> str:
    """In words, which numbers of query heads `heads_that_fit` gives."""
    return families.find_family(config).heads.when.format(width=shape.width)


def _cannot_say(config: Mapping[str, Any], why: str) -> str:
    *others, last = shrinkable(config)
    able = f"{', '.join(others)} and {last} only"
    if {"neurons", "heads"} <= {*shrinkable(config)}:
        able = "less"
    return (
        f"the config.json of a {config['model_type']} model cannot say this shape: "
        f"{why}; remove {able}"
    )


def _layerwise(
    config: Mapping[str, Any], shape: DecoderConfig, kept: Sequence[int]
) -> dict[str, Any]:
    """Attributes that go by the number of a layer."""
    new: dict[str, Any] = dict(families.find_family(config).layer_attributes(shape))
    types = config.get("layer_types")
    if types is not None:
        new["layer_types"] = [types[i] for i in kept]
    first = config.get("max_window_layers")
    if first is not None:
        new["max_window_layers"] = sum(i < first for i in kept)
    return new


def shrinkable(config: Mapping[str, Any]) -> list[str]:
    """What the models of a config.json's family can have fewer of.

    Args:
      config: content of the config.json.

    Returns:
      Some of "layers", "experts", "neurons" and "heads".

    Raises:
      ValueError: the model type is not supported.

    Example:
      >>> shrinkable({"model_type": "gpt2"})
      ['layers', 'neurons']
    """
    names = {
        "layers": "layers",
        "experts": "experts",
        "mlp_width": "neurons",
        "heads": "heads",
    }
    resized = families.find_family(config).resized
    return [word for field, word in names.items() if field in resized]
