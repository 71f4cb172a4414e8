"""What the options of the steps must keep, as one table, in the words of the command.

A step checks its rules before it opens a file. The values of a rule have the names of
the options, whatever group they are in. What depends on the model is checked where the
model is opened.
"""

from collections.abc import Iterable
from typing import Any

from jaxprune.arrays.rules import Rule, check, within
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.corpora import text_files
from jaxprune.lm.steps.option_rules import (
    SEED,
    at_least,
    idle_without,
    not_while,
    option_values,
)
from jaxprune.lm.steps.settings import (
    SELF,
    Job,
    Pruning,
)
from jaxprune.lm.vocabulary.new_vocabulary import MULTIPLE
from jaxprune.masking import patterns

_TEXTS = (
    *(at_least(option, 1) for option in ("sequences", "batch")),
    at_least("length", 8, " tokens"),
    SEED,
    Rule(
        lambda v: v.calibration.count(SELF) <= 1,
        "--calibration self is given twice; once is enough",
    ),
    Rule(
        # The model's own text has the last share of a mixture, rounded down.
        lambda v: v.self_sequences or SELF not in v.calibration,
        "--sequences {sequences} must be enough for each calibration text and self; "
        "give more",
    ),
)

PRUNE = (
    Rule(
        lambda v: v.fixed is not None or v.sparsity is not None,
        "how much to remove is not said, and {pattern} leaves it free; give "
        "--sparsity 0.5",
    ),
    Rule(
        lambda v: v.fixed is None or v.sparsity in (None, v.fixed),
        "{pattern} removes exactly {fixed:.4g} of each weight, but --sparsity "
        "{sparsity:g} was asked for; leave --sparsity out",
    ),
    Rule(
        lambda v: v.fixed is None or v.allocation == "layer",
        "--allocation {allocation} needs one sparsity to share out, but {pattern} "
        "removes exactly {fixed:.4g} of each weight; leave --allocation out",
    ),
    Rule(
        lambda v: not v.quantize or (v.group >= 16 and v.group % 16 == 0),
        "--group must be a multiple of 16 inputs, got {group}; 128 is usual",
    ),
    *_TEXTS,
    Rule(
        lambda v: v.streams or v.sequences % v.batch == 0,
        "--sequences must be divisible by --batch, got {sequences} and {batch}; all "
        "batches have one shape",
    ),
    idle_without(
        Pruning, "group", "quantize", "--quantize int4, whose scales it is for"
    ),
    Rule(  # the other methods round what they have solved, whatever its pattern
        lambda v: (
            not (v.quantize and v.method == "sparsegpt")
            or not isinstance(v.units, patterns.Block)
        ),
        "--quantize takes unstructured, per-output and n:m patterns, got --pattern "
        "{pattern}; leave --quantize out, or take another pattern",
    ),
    Rule(
        lambda v: (
            not (v.quantize and v.method == "sparsegpt")
            or not isinstance(v.units, patterns.NM)
            or v.group % v.units.m == 0
        ),
        "--group must be whole groups of --pattern {pattern}, got {group} inputs; give "
        "a multiple of 16 and {units.m}",
    ),
    Rule(
        lambda v: (
            v.device_count is None or (v.sequences // v.batch) % v.device_count == 0
        ),
        "each of the {device_count} devices of --mesh {mesh} takes a batch, so "
        "--sequences must be divisible by {device_count} x --batch {batch}, got "
        "{sequences}; give other numbers, or a smaller mesh",
    ),
    Rule(
        lambda v: not v.distributed or v.mesh,
        "--distributed needs a --mesh of all devices, got none",
    ),
    *(
        not_while(
            "distributed",
            option,
            f"several processes do no {words}",
            "leave --distributed out",
        )
        for option, words in (
            ("self_sequences", "--calibration self"),
            ("streams", "magnitude without --calibration"),
        )
    ),
    Rule(
        lambda v: not v.streams or v.allocation == "layer",
        "magnitude without --calibration does no --allocation {allocation}; give "
        "--calibration FILE..., which loads the model, or leave it out",
    ),
    Rule(
        lambda v: not v.streams or not v.quantize,
        "magnitude without --calibration does no --quantize; give --calibration "
        "FILE..., which loads the model, or leave it out",
    ),
)


def _share(option: str) -> Rule:
    return Rule(
        lambda v: 0 <= getattr(v, option) < 1,
        f"--{option} must be a share in [0, 1), got {{{option}}}",
    )


SHRINK = (
    *map(_share, ("ffn", "heads", "experts")),
    Rule(
        lambda v: v.budget is None or 0 < v.budget < 1,
        "--budget must be a share in (0, 1), got {budget}",
    ),
    Rule(
        lambda v: v.budget is None or not {*v.asked} - {"budget", "multiple"},
        "--budget chooses what goes, so it stands alone, but {others} was given too; "
        "remove it by another `jaxprune shrink`",
    ),
    Rule(
        lambda v: bool(v.asked),
        "something must be removed; give --ffn, --heads, --experts, --layers or "
        "--budget",
    ),
    Rule(
        lambda v: len(v.layers) != 1 or v.calibration,
        "--layers {layers[0]} needs --calibration FILE..., by which the layers are "
        "chosen; give the numbers of all that stay without",
    ),
    Rule(
        lambda v: not v.experts or v.calibration,
        "--experts needs --calibration FILE..., on which the router shows what it "
        "gives each expert",
    ),
    Rule(
        lambda v: len(v.layers) != 1 or v.layers[0] >= 1,
        "--layers must leave at least 1, got {layers[0]}",
    ),
    at_least("multiple", 1),
    Rule(
        lambda v: v.multiple <= 1 or v.ffn or v.budget,
        "--multiple is a rule for the neurons that stay, so some must go; give --ffn "
        "or --budget too, or leave it out",
    ),
    *_TEXTS,
)

TRIM = (
    Rule(
        lambda v: v.tokens > 0 and v.tokens % MULTIPLE == 0,
        f"--tokens must be a positive multiple of {MULTIPLE}, got {{tokens}}",
    ),
    Rule(lambda v: v.files, "trim needs --calibration FILE..., whose tokens it counts"),
    Rule(
        lambda v: not v.ids,
        "trim splits the texts anew, which token ids cannot be, got {ids}; give the "
        "texts themselves",
    ),
    *_TEXTS,
)

RECOVER = (
    at_least("steps", 1),
    Rule(
        lambda v: v.calibration,
        "recover trains on texts, got none; give them by --calibration",
    ),
    Rule(
        lambda v: v.teacher is not None or v.calibration.count(SELF) == 0,
        "--calibration self is what the teacher writes; give --teacher too",
    ),
    Rule(
        lambda v: v.learning_rate is None or 0 < v.learning_rate < 1,
        # Adam's, which moves each weight as far
        "--learning-rate must be in (0, 1), got {learning_rate}",
    ),
    within("text_share", 0, 1, "--text-share must be from 0 to 1, got {text_share}"),
    Rule(
        lambda v: not v.text_share or v.teacher is not None,
        "--text-share stands beside the teacher's predictions, so it needs --teacher",
    ),
    Rule(
        lambda v: v.text_share < 1 or SELF in v.calibration,
        "--text-share 1 learns the texts and follows nothing; leave --teacher out, or "
        "give self beside --calibration",
    ),
    *_TEXTS,
)

_IN_TRANSFORMERS = "build a smaller model in transformers, or give --ffn or --heads"


def _not_in_torch(option: str, hint: str) -> Rule:
    return not_while(
        "through_torch",
        option,
        "a model that goes through torch takes no {flag}",
        hint,
        lambda v: bool(getattr(v, option, None)),
    )


THROUGH_TORCH = (
    _not_in_torch("ignore_config", "leave it out: transformers reads config.json"),
    _not_in_torch("mesh", "leave it out: it runs on one device"),
    _not_in_torch("distributed", "leave it out: it runs on one device"),
    _not_in_torch("layers", _IN_TRANSFORMERS),
    _not_in_torch("experts", _IN_TRANSFORMERS),
    _not_in_torch("budget", "give --ffn and --heads, or use jp.torch.shrink(keep=...)"),
    Rule(
        lambda v: not v.through_torch or v.bos is None,
        "a model that goes through torch takes no --bos; leave it out: its tokenizer "
        "puts its own tokens around, and token ids as .npy are used as they are",
    ),
    Rule(
        lambda v: not (v.through_torch and getattr(v, "self_sequences", 0)),
        "a model that goes through torch writes no --calibration self; give "
        "--calibration with a text, a folder of pictures or of wav files, or .npz",
    ),
)


def check_options(
    job: Job, rules: Iterable[Rule], *, through_torch: bool = False, **values: Any
) -> None:
    """Refuses what can be refused without opening the model.

    Args:
      job: options of the step.
      rules: rules of the step, of this module.
      through_torch: whether the model is of no family of ours.
      **values: more values that the rules read.

    Raises:
      ValueError: a rule is broken, or the place is taken; the sentence names the
        option.
      FileNotFoundError: a text is not there.
    """
    texts = job.calibration
    paths = (*texts.files, *texts.evaluate)
    values = {
        **option_values(job),
        "files": texts.files,
        "self_sequences": texts.self_sequences,
        "ids": ", ".join(str(path) for path in paths if text_files.is_ids(path)),
        "through_torch": through_torch,
        **values,
    }
    check((*THROUGH_TORCH, *rules), **values)
    if not through_torch:
        text_files.check_text_files(paths)
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
