"""Whether `--budget` can be met, which the shapes say before a weight is read."""

import contextlib
import dataclasses
from collections.abc import Iterator

from flax import nnx

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.jobs.width_rules import channels_left
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import possible_sizes, unequal, units
from jaxprune.structured.budget import OutOfReach

_SEARCHED = Rule(
    lambda v: v.share < 1,
    "--budget {budget:g} is met by fewer tokens or channels alone, so nothing is left "
    "to search",
    "give a smaller budget, or leave --search out",
)


def check_budget(removal: Removal, source: CheckpointDir, model: LoadedModel) -> None:
    """Refuses a budget that is out of reach, or leaves nothing to search.

    Not known yet are milliseconds, and which of layers of different sizes will stay.

    Args:
      removal: what is to go.
      source: directory of the model.
      model: model, whose parameters are not read.

    Raises:
      OutOfReach: the smallest model that the options allow costs more.
      ValueError: fewer tokens or channels meet the budget, and it is to be searched.
    """
    if removal.budget is None or removal.measure == "milliseconds":
        return
    if model.config.layer_sizes and (removal.layers or removal.search):
        return
    small = _without_fixed_parts(removal, source, model)
    if removal.search:
        check_search(removal, remaining_budget(removal, model, small))
        small = units.keep_layers(small, [0])  # a search leaves one at least
    share = remaining_budget(removal, model, small)
    if share == 1:
        return
    narrowing = removal.narrowing._replace(
        budget=share,
        head_units=possible_sizes.possible_head_units(source.config, small.config),
    )
    groups = units.group_axes(small)[2]
    roles = units.group_roles(groups, small.config)
    with names_whole_budget(removal, share):
        unequal.equal_sizes(groups, narrowing, roles, small.config)


def check_search(removal: Removal, share: float) -> None:
    """Refuses a search of a budget that is met before it.

    Args:
      removal: what is to go.
      share: share that may stay of the model that is searched.

    Raises:
      ValueError: all of it may.
    """
    check([_SEARCHED], share=share, budget=removal.budget)


def remaining_budget(removal: Removal, dense: LoadedModel, small: LoadedModel) -> float:
    """The share that may stay of a model which lost some of its parts before.

    Args:
      removal: what is to go.
      dense: whole model, which the budget is of.
      small: model without those parts.

    Returns:
      The share, at most 1.
    """
    budget = removal.budget or 1.0
    if small.config == dense.config:
        return budget
    # Both by the same count.
    before, after = (units.count_cost(m, removal.measure) for m in (dense, small))
    return min(budget * before / after, 1.0)


@contextlib.contextmanager
def names_whole_budget(removal: Removal, share: float | None) -> Iterator[None]:
    """Names a budget that is out of reach as it was asked for, and not what is left.

    Args:
      removal: what is to go.
      share: budget of the model that lost some of its parts before.

    Yields:
      Nothing.

    Raises:
      OutOfReach: it was raised inside.
    """
    try:
        yield
    except OutOfReach as error:
        if share == removal.budget:
            raise
        raise OutOfReach(
            f"--budget {removal.budget:g} is of the whole model; once all else is "
            f"gone, {error}"
        ) from None


def _without_fixed_parts(
    removal: Removal, source: CheckpointDir, model: LoadedModel
) -> LoadedModel:
    """The shapes without what goes in any case, before heads and neurons do."""
    config = model.config
    if removal.vocab is not None:
        config = dataclasses.replace(config, vocab_size=removal.vocab)
    if removal.hidden:
        config = hf.with_width(config, channels_left(removal, source, config))
    if removal.experts:
        left = config.experts - round(removal.experts * config.experts)
        config = dataclasses.replace(config, experts=left)
    if config != model.config:
        _, params = nnx.split(hf.abstract(config), nnx.Param)
        model = model.reshaped(config, params)
    layers = removal.layers or config.layers
    kept = [i for i in range(layers) if i not in removal.drop_layers]
    return units.keep_layers(model, kept) if len(kept) < config.layers else model
