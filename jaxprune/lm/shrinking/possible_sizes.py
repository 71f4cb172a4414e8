"""How many heads and neurons the layers of a model have, and may be left with."""

from typing import Any

from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig


def count_head_units(config: DecoderConfig) -> int:
    """Number of units that heads are removed by: key heads, or query heads of one."""
    return config.heads if config.kv_heads == 1 else config.kv_heads


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
