"""The rules that the settings of `jaxprune shrink` keep, of themselves and the model.

Those of themselves are asked before anything is opened, those of the model before its
parameters are read.
"""

import math

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import recovery_settings, settings
from jaxprune.lm.jobs.head_rules import check_heads
from jaxprune.lm.jobs.option_rules import at_least, not_while, option_values
from jaxprune.lm.jobs.shrink_settings import Removal, ShrinkJob
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.shrinking.possible_sizes import count_head_units, multiples
from jaxprune.lm.texts import text_files
from jaxprune.lm.vocabulary.new_vocabulary import MULTIPLE

_SHARES = ("ffn", "heads", "query_heads", "experts")


def _share(option: str) -> Rule:
    flag = option.replace("_", "-")
    return Rule(
        lambda v: 0 <= getattr(v, option) < 1,
        f"--{flag} must be a share in [0, 1), got {{{option}}}",
    )


_BUDGET = (
    # A budget and a share would be two answers to one question.
    Rule(
        lambda v: v.budget is None or 0 < v.budget < 1,
        "--budget must be a share in (0, 1), got {budget}",
    ),
    Rule(
        lambda v: v.budget is None or max(v.ffn, v.heads, v.query_heads) <= 0,
        "--budget finds the shares of neurons and heads itself; leave out --ffn, "
        "--heads and --query-heads, or the budget",
    ),
    Rule(
        lambda v: v.budget is not None or v.measure == "parameters",
        "--measure {measure} says what a budget is of; give --budget too",
    ),
)
_REMOVAL = (
    Rule(
        lambda v: v.layers is None or not v.drop_layers,
        "--layers and --drop-layers exclude each other; give one",
    ),
    Rule(
        lambda v: bool(v.asked),
        "something must be removed; give --ffn, --heads, --query-heads, --experts, "
        "--layers, --drop-layers, --budget or --vocab",
    ),
    Rule(
        lambda v: v.layers is None or v.calibration,
        "--layers needs --calibration FILE..., by which the layers are chosen; "
        "--drop-layers names them without",
    ),
    Rule(
        lambda v: not v.experts or v.calibration,
        "--experts needs --calibration FILE..., on which the router shows what it "
        "gives each expert",
    ),
    Rule(
        lambda v: 0 <= v.correction <= 1,
        "--correction must be a share in [0, 1], got {correction}",
    ),
    Rule(
        lambda v: not v.correction or v.calibration,
        "--correction goes by what layers get on a text; give --calibration FILE..., "
        "or leave it out",
    ),
    Rule(
        lambda v: not v.correction or v.ffn or v.heads or v.query_heads or v.budget,
        "--correction makes up for neurons and heads that go; give --ffn, "
        "--heads, --query-heads or --budget too, or leave it out",
    ),
    at_least("speed_rounds", 0),
    at_least("layers", 1),
    at_least("multiple", 1),
    Rule(
        lambda v: v.multiple <= 1 or v.ffn or v.budget,
        "--multiple is a rule for the neurons that stay, so some must go; give --ffn "
        "or --budget too, or leave it out",
    ),
)
_VOCABULARY = (
    Rule(
        lambda v: v.vocab is None or (v.vocab > 0 and v.vocab % MULTIPLE == 0),
        f"--vocab must be a positive multiple of {MULTIPLE}, got {{vocab}}",
    ),
    Rule(
        lambda v: v.vocab is None or v.files,
        "--vocab needs --calibration FILE..., whose tokens it counts",
    ),
    Rule(
        lambda v: v.vocab is None or not v.ids,
        "--vocab splits the texts anew, which token ids cannot be, got {ids}; give the "
        "texts themselves",
    ),
    Rule(
        # Teacher and student would be one model from the first step on.
        lambda v: (
            v.vocab is None
            or not v.recover_steps
            or v.recover_by != "distillation"
            or v.recover_teacher is not None
            or len(v.asked) > 1
        ),
        "--vocab alone leaves nothing to distil, since the tokens that stay keep their "
        "weights; give --recover-by retraining or a --recover-teacher, or remove more",
    ),
)
RULES = (
    *map(_share, _SHARES),
    *(*_BUDGET, *_REMOVAL, *_VOCABULARY, *settings.RULES, *recovery_settings.RULES),
)
"""What the options keep among themselves."""


def check_shrink(job: ShrinkJob) -> None:
    """Refuses what can be refused without opening the model."""
    files = job.calibration.files
    paths = (*files, *job.evaluation.evaluate, *job.recovery.trained_files)
    check(
        RULES,
        **option_values(job),
        asked=job.removal.asked,
        files=files,
        self_sequences=job.calibration.self_sequences,
        fewer_tokens=job.removal.vocab is not None,
        ids=", ".join(str(path) for path in paths if text_files.is_ids(path)),
        through_torch=False,
    )
    text_files.check_text_files(paths)
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)


_LAYERS = (
    Rule(
        lambda v: v.vocab is None or v.vocab < v.vocab_size,
        "--vocab must be less than the {vocab_size} tokens that there are, got {vocab}",
    ),
    Rule(
        lambda v: v.layers is None or v.layers < v.count,
        "--layers must be less than the {count} that there are, got {layers}",
    ),
    Rule(
        lambda v: (
            all(0 <= layer < v.count for layer in v.drop_layers)
            and len({*v.drop_layers}) < v.count
        ),
        "--drop-layers must be numbers from 0 to {last}, not all, got {dropped}",
    ),
    Rule(
        # With one key head or one for each query head, --heads says it all.
        lambda v: not v.query_heads or v.kv_heads not in (1, v.head_count),
        "--query-heads needs several key heads with several query heads each, got "
        "{head_count} query and {kv_heads} key heads; give --heads",
    ),
)
_UNITS = (
    # config.json cannot say that a layer has none.
    Rule(
        lambda v: v.lost < v.units,
        "a group must keep a unit, but --{option} {share:g} would remove all {units} "
        "{name}",
        "give at most {most:.4g}",
    ),
    Rule(
        # Rounded to nothing, a share would be taken for done.
        lambda v: v.lost or not v.share,
        "--{option} {share:g} of {units} {name} is less than one of them",
        "give at least {least:.4g}",
    ),
)
# The router picks so many of the experts for each token.
_EXPERTS = Rule(
    lambda v: v.lost <= v.most,
    "each token is given to {used} of the {count} experts, so at most {most} can go",
    "give --experts at most {share:.4g}",
)
_MULTIPLE = (
    # The nearest multiple may be all of them.
    Rule(
        lambda v: not v.ffn or v.remaining < v.width,
        "--ffn {ffn:g} with --multiple {multiple} leaves all {width} neurons",
        "give a larger share or a smaller multiple",
    ),
    Rule(
        lambda v: not v.budget or v.multiple < v.width,
        "--multiple must be less than the {width} neurons for some to go, got "
        "{multiple}",
    ),
)
_FAMILY = (
    not_while(
        "without_experts",
        "experts",
        "{flag} is for mixtures of experts, which model_type {family} is not",
        "leave it out",
    ),
    *(
        not_while(
            f"without_{unit}",
            f"removes_{unit}",
            f"a directory of model_type {{family}} cannot have fewer {unit}",
            "give {able}--layers or --drop-layers",
        )
        for unit in ("neurons", "heads")
    ),
)


def check_fits(
    removal: Removal,
    source: CheckpointDir,
    config: DecoderConfig,
) -> None:
    """Refuses what this model cannot lose, before its parameters are read.

    Args:
      removal: what is to go.
      source: directory of the model, whose family may forbid it.
      config: shape of the model.

    Raises:
      ValueError: it cannot go; the sentence says what can.
    """
    check(
        _LAYERS,
        **option_values(removal),
        vocab_size=config.vocab_size,
        count=config.layers,
        last=config.layers - 1,
        dropped=", ".join(map(str, removal.drop_layers)),
        kv_heads=config.kv_heads,
        head_count=config.heads,
    )
    _check_family(removal, source)
    name = "query heads" if config.kv_heads == 1 else "key heads"
    _check_units("ffn", removal.ffn, config.mlp_width, "neurons")
    heads = count_head_units(config)
    _check_units("heads", removal.heads, heads, name)
    if removal.experts:
        _check_experts(removal.experts, config)
    name = "query heads of each key head"
    queries = config.heads // config.kv_heads
    _check_units("query-heads", removal.query_heads, queries, name)
    check_heads(removal, source, config)
    if removal.multiple > 1 and "neurons" in hf.shrinkable(source.config):
        check(
            _MULTIPLE,
            **option_values(removal),
            width=config.mlp_width,
            remaining=neurons_left(removal, config.mlp_width),
        )


def neurons_left(removal: Removal, width: int) -> int:
    """Number of neurons of a layer that `--ffn` leaves."""
    nearest = width - round(removal.ffn * width)  # before it is made a multiple
    if nearest == width:
        return width
    possible = multiples(removal.multiple, width)  # of two as near, the larger
    return min(possible, key=lambda n: (abs(n - nearest), -n), default=width)


def _check_family(removal: Removal, source: CheckpointDir) -> None:
    """Refuses to take what the directories of a family cannot have fewer of."""
    able = hf.shrinkable(source.config)
    flags = {"neurons": "--ffn, ", "heads": "--heads, ", "experts": "--experts, "}
    heads = removal.heads or removal.query_heads or removal.budget
    check(
        _FAMILY,
        experts=removal.experts,
        **{f"without_{unit}": unit not in able for unit in flags},
        removes_neurons=removal.ffn or removal.budget,
        removes_heads=heads,
        family=source.config["model_type"],
        able="".join(flags[unit] for unit in able if unit in flags),
    )


def _check_units(option: str, share: float, units: int, name: str) -> None:
    """Refuses a share that leaves no unit, or takes none."""
    check(
        _UNITS,
        option=option,
        share=share,
        units=units,
        name=name,
        lost=round(share * units),
        most=(units - 1) / units if units else math.nan,
        least=1 / units if units else math.nan,
    )


def _check_experts(share: float, config: DecoderConfig) -> None:
    """Refuses to leave fewer experts than a token is given to."""
    _check_units("experts", share, config.experts, "experts")
    most = config.experts - config.experts_per_token
    check(
        [_EXPERTS],
        lost=round(share * config.experts),
        most=most,
        used=config.experts_per_token,
        count=config.experts,
        share=most / config.experts,
    )
