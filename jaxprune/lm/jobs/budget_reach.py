"""Whether `--budget` can be met, which the shapes say before a weight is read."""

import contextlib
import dataclasses
from collections.abc import Iterator

from flax import nnx

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import possible_sizes, units
from jaxprune.structured.budget import OutOfReach
from jaxprune.structured.sizes import lost_units


def check_budget(removal: Removal, source: CheckpointDir, model: LoadedModel) -> None:
    """Refuses a budget that is out of reach. No mixture of experts takes a budget.

    Args:
      removal: what is to go.
      source: directory of the model.
      model: model, whose parameters are not read.

    Raises:
      OutOfReach: the smallest model that the options allow costs more.
    """
    if removal.budget is None:
        return
    small = _with_fewer_tokens(removal, model)
    # Which layers stay does not matter to the cost.
    count = removal.layers or model.config.layers
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
        request = units.narrowing_request(narrowing, roles, small.config)
        lost_units(groups, request["keep"], request["groups"], request["sizes"])


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


def _with_fewer_tokens(removal: Removal, model: LoadedModel) -> LoadedModel:
    if removal.vocab is None:
        return model
    config = dataclasses.replace(model.config, vocab_size=removal.vocab)
    _, params = nnx.split(hf.abstract(config), nnx.Param)
    return model.reshaped(config, params)
