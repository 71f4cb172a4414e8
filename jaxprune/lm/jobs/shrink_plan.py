"""`jaxprune shrink --plan`: the smaller shape, and the texts."""

from typing import Any, TypeAlias

from jaxprune.arrays.messages import columns
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.plan_words import say_texts
from jaxprune.lm.jobs.shrink_rules import neurons_left
from jaxprune.lm.jobs.shrink_settings import Removal, ShrinkJob
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking.possible_sizes import count_head_units


def plan_shrink(
    job: ShrinkJob, model: LoadedModel, texts: JobTexts, console: Console
) -> dict[str, Any]:
    """Says what `jaxprune shrink` would do.

    Args:
      job: what was asked for.
      model: model whose parameters are in their files.
      texts: what would be calibrated and evaluated on.
      console: where it is said.

    Returns:
      A JSON-able plan.
    """
    removal = job.removal
    shapes = _shapes(removal, model.config)
    if removal.budget:  # what it is divided over is not known yet, all else is
        shapes = [shape for shape in shapes if shape[1] != shape[2]]
        console.say(
            f"{removal.budget:.1%} of the {removal.measure} would be left; what goes "
            "is divided over both alike when it runs"
        )
    if shapes:
        rows = [[what, f"{now:,}", f"{then:,}"] for what, now, then in shapes]
        console.say(columns([["", "now", "then"], *rows], right=True))
    say_texts(job, texts, console)
    return {
        "plan": {what: [now, then] for what, now, then in shapes},
        "asked": removal.asked,
    }


def _layers_left(removal: Removal, config: DecoderConfig) -> int:
    return removal.layers or config.layers - len({*removal.drop_layers})


Shape: TypeAlias = tuple[str, int, int]
"""What there are several of, and their number now and then."""


def _shapes(removal: Removal, config: DecoderConfig) -> list[Shape]:
    """What the model has, now and then."""
    heads = count_head_units(config)
    shapes: list[Shape] = [
        ("layers", config.layers, _layers_left(removal, config)),
        ("neurons a layer", config.mlp_width, neurons_left(removal, config.mlp_width)),
        ("heads a layer", heads, _without_share(heads, removal.heads)),
    ]
    if removal.vocab:
        shapes.insert(0, ("tokens", config.vocab_size, removal.vocab))
    if removal.query_heads:
        queries = config.heads // config.kv_heads
        name = "query heads of each key head"
        shapes.append((name, queries, _without_share(queries, removal.query_heads)))
    if config.experts:
        remaining = _without_share(config.experts, removal.experts)
        shapes.append(("experts a layer", config.experts, remaining))
    return shapes


def _without_share(units: int, share: float) -> int:
    return units - round(share * units)
