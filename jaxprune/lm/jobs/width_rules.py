"""How many channels of the residual stream `--hidden` leaves, and what forbids it."""

import dataclasses
from collections.abc import Sequence

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.shrinking.possible_sizes import count_head_units, multiples

_RULES = (
    # OLMo 2: its matrices read the stream as it is.
    Rule(
        lambda v: v.block != "post",
        "--hidden chooses channels by what the norms before attention and MLP give, "
        "but a model of type {family} has its norms behind them",
        "give --ffn or --layers",
    ),
    Rule(
        lambda v: v.remaining < v.width,
        "--hidden {hidden:g} leaves all {width} channels, since the nearest number "
        "that is a multiple of {multiple} and suits {heads} query heads is as many",
        "give a larger share or a smaller --multiple",
    ),
)


def check_width(
    removal: Removal,
    source: CheckpointDir,
    config: DecoderConfig,
    ignore_config: Sequence[str],
) -> DecoderConfig:
    """Refuses to take channels that this model cannot lose.

    Args:
      removal: what is to go.
      source: directory of the model.
      config: shape of the model.
      ignore_config: attributes of config.json that are not looked at.

    Returns:
      The shape without the channels that `--hidden` removes.

    Raises:
      ValueError: they cannot go; the sentence says why.
    """
    if not removal.hidden:
        return config
    remaining = channels_left(removal, source, config)
    hf.check_channels(config, range(remaining))
    check(
        _RULES,
        hidden=removal.hidden,
        multiple=removal.multiple,
        block=config.block,
        family=source.config["model_type"],
        remaining=remaining,
        width=config.width,
        heads=_heads_left(removal, config).heads,
    )
    narrow = hf.with_width(config, remaining)
    fewer_heads = _heads_left(removal, narrow)
    # A family may have no attribute for the size of a head that is not width / heads.
    hf.smaller_config(source.config, fewer_heads, ignore_config=ignore_config)
    return narrow


def channels_left(
    removal: Removal, source: CheckpointDir, config: DecoderConfig
) -> int:
    """Number of channels that `--hidden` leaves: what transformers takes, the nearest.

    Args:
      removal: what is to go.
      source: directory of the model.
      config: shape of the model.

    Returns:
      The number; all, where no other is possible.
    """
    width, heads = config.width, _heads_left(removal, config).heads
    nearest = width - round(removal.hidden * width)
    possible = [
        n
        for n in multiples(removal.multiple, width)
        if heads in hf.heads_that_fit(source.config, hf.with_width(config, n))
    ]  # of two as near, the larger
    return min(possible, key=lambda n: (abs(n - nearest), -n), default=width)


def _heads_left(removal: Removal, config: DecoderConfig) -> DecoderConfig:
    """The shape without the heads that are asked to go."""
    units = count_head_units(config)
    kept = units - round(removal.heads * units)
    queries = config.heads // units
    queries -= round(removal.query_heads * queries)
    kv_heads = 1 if config.kv_heads == 1 else kept
    return dataclasses.replace(config, heads=kept * queries, kv_heads=kv_heads)
