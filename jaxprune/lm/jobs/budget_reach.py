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

    Milliseconds are not known yet, nor which of layers of different sizes will stay. No
    mixture of experts takes a budget.

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
    small = _with_fewer_tokens_and_channels(removal, source, model)
    if removal.search:
        share = remaining_budget(removal, model, small)
        check([_SEARCHED], share=share, budget=removal.budget)
    if model.config.layer_sizes and (removal.search or removal.layers):
        return
    # Which layers stay does not matter to the cost. A search leaves one at least.
    count = 1 if removal.search else removal.layers or model.config.layers
    kept = [i for i in range(count) if i not in removal.drop_layers]
    small = units.keep_layers(small, kept)
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


def _with_fewer_tokens_and_channels(
    removal: Removal, source: CheckpointDir, model: LoadedModel
) -> LoadedModel:
    config = model.config
    if removal.vocab is not None:
        config = dataclasses.replace(config, vocab_size=removal.vocab)
    if removal.hidden:
        config = hf.with_width(config, channels_left(removal, source, config))
    if config == model.config:
        return model
    _, params = nnx.split(hf.abstract(config), nnx.Param)
    return model.reshaped(config, params)
