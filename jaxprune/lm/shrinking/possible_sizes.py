"""How many heads and neurons the layers of a model have, and may be left with."""

from typing import Any

from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig


def count_head_units(config: DecoderConfig) -> int:
    """Number of units that heads are removed by: key heads, or query heads of one."""
    return config.heads if config.kv_heads == 1 else config.kv_heads


def fewest_units(config: DecoderConfig) -> tuple[int, int]:
    """The least number of units of heads of a layer, and of query heads of a key head.

    Layers with one head lose none and do not count.

    Args:
      config: shape of the model.

    Returns:
      The two numbers.
    """
    layers = [config.sizes(layer) for layer in range(config.layers)]
    heads = [n if kv == 1 else kv for n, kv, _ in layers if n > 1]
    queries = [n // kv for n, kv, _ in layers if n > kv]
    default = count_head_units(config), config.heads // config.kv_heads
    return min(heads, default=default[0]), min(queries, default=default[1])


def multiples(multiple: int, width: int) -> range:
    """The numbers of neurons that may stay of so many."""
    return range(multiple, width + 1, multiple)


def possible_head_units(
    checkpoint_config: Any, config: DecoderConfig
) -> tuple[int, ...]:
    """The numbers of units of heads that a checkpoint can have, that of today too.

    Args:
      checkpoint_config: config.json of the directory.
      config: shape of the model.

    Returns:
      The numbers.
    """
    units = count_head_units(config)
    heads_per_unit = config.heads // units
    fit = hf.heads_that_fit(checkpoint_config, config)
    whole = (heads // heads_per_unit for heads in fit if heads % heads_per_unit == 0)
    return (*whole, units)
