"""How many query heads a directory of a smaller model may have."""

from typing import Any

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.shrinking.possible_sizes import count_head_units

# Loaders would refuse the directory.


def check_heads(removal: Removal, source: CheckpointDir, config: DecoderConfig) -> None:
    """Refuses to leave so many query heads that transformers would not take them.

    Args:
      removal: what is to go.
      source: directory of the model.
      config: shape of the model.

    Raises:
      ValueError: it would not; the sentence says which shares it takes.
    """
    units = count_head_units(config)
    per_unit = config.heads // units  # query heads
    kept = units - round(removal.heads * units)
    shared = per_unit - round(removal.query_heads * per_unit)
    fit = hf.heads_that_fit(source.config, config)
    alternatives = _fitting("heads", removal.heads, units, shared, fit)
    alternatives += _fitting("query-heads", removal.query_heads, per_unit, kept, fit)
    remaining = kept * shared
    if remaining not in (*fit, config.heads):
        raise ValueError(
            f"transformers takes a {source.config['model_type']} model only where "
            f"{hf.when_heads_fit(source.config, config)}, but {remaining} of "
            f"{config.heads} query heads would be left; give "
            f"{' or '.join(alternatives) or 'no share of the heads'}"
        )


def _fitting(option: str, share: float, units: int, factor: int, fit: Any) -> list[str]:
    """The shares of an option that leave a number of query heads which fits."""
    if not share:
        return []
    counts = (n for n in range(units - 1, 0, -1) if n * factor in fit)
    return [f"--{option} {1 - n / units:.4g}" for n in counts]
