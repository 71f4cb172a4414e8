"""The rules that the settings of `jaxprune prune` keep, before anything is opened."""

import re

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.jobs import passes, recovery_settings, settings
from jaxprune.lm.jobs.option_rules import (
    idle_without,
    not_while,
    option_values,
)
from jaxprune.lm.jobs.prune_settings import PruneJob, Quantization
from jaxprune.lm.models.loaded_model import device_mesh
from jaxprune.lm.texts import text_files
from jaxprune.masking import patterns

# How a pattern is written: these words, n:m, or rows x columns of a block.
_PATTERN = re.compile(r"unstructured|per-output|\d+:\d+|\d+x\d+")


WORDS = (
    Rule(
        lambda v: v.pattern is None or bool(_PATTERN.fullmatch(v.pattern)),
        "--pattern must be one of unstructured, per-output, n:m as in 2:4, or a block "
        "as in 16x16, got '{pattern}'",
    ),
    Rule(
        lambda v: not v.quantize or (v.group >= 16 and v.group % 16 == 0),
        "--group must be a multiple of 16 inputs, got {group}; 128 is usual",
    ),
)
"""What the words of a pruning keep, before they are read as values."""

_SHARES = (
    # n:m fixes the share of each matrix; all other patterns leave it to --sparsity.
    Rule(
        lambda v: v.fixed is not None or v.sparsity is not None,
        "how much to remove is not said, and {pattern} leaves it free",
        "give --sparsity 0.5",
    ),
    Rule(
        lambda v: v.fixed is None or v.sparsity in (None, v.fixed),
        "{pattern} removes exactly {fixed:.4g} of each weight, but --sparsity "
        "{sparsity:g} was asked for",
        "leave --sparsity out",
    ),
    Rule(
        lambda v: v.fixed is None or v.allocation == "layer",
        "--allocation {allocation} needs one sparsity to share out, but {pattern} "
        "removes exactly {fixed:.4g} of each weight",
        "leave --allocation out",
    ),
)

_NUMBERS = (
    # Another shape would be another program; the streamed way has no batches.
    Rule(
        lambda v: v.streams or v.sequences % v.batch == 0,
        "--sequences must be divisible by --batch, got {sequences} and {batch}; all "
        "batches have one shape",
    ),
    idle_without(
        Quantization, "group", "quantize", "--quantize int4, whose scales it is for"
    ),
)

_QUANTIZED = (
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
    not_while(
        "quantize",
        "recover_steps",
        "--quantize comes last, so it takes no {flag}, which would move the weights "
        "off their levels",
        "leave one of them out",
    ),
)

_DEVICES = (
    # Batches are handed to devices in rounds, in which none may be without one.
    Rule(
        lambda v: (
            v.device_count is None or (v.sequences // v.batch) % v.device_count == 0
        ),
        "each of the {device_count} devices of --mesh {mesh} takes a batch, so "
        "--sequences must be divisible by {device_count} x --batch {batch}, got "
        "{sequences}; give other numbers, or a smaller mesh",
    ),
    Rule(
        # Without a mesh each process would prune by itself.
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
            ("recover_steps", "--recover-steps"),
            ("streams", "magnitude without --calibration"),
        )
    ),
)

# The model's code is not there, so what runs the model cannot be done.
_STREAMED = tuple(
    not_while(
        "streams",
        option,
        f"magnitude without --calibration does no {words}",
        "give --calibration FILE..., which loads the model, or leave it out",
        clashes,
    )
    for option, words, clashes in (
        ("allocation", "--allocation {allocation}", lambda v: v.allocation != "layer"),
        ("quantize", "--quantize", None),
        ("recover_steps", "--recover-steps", None),
    )
)


RULES = (
    *(*_SHARES, *settings.RULES, *recovery_settings.RULES, *_NUMBERS),
    *(*_QUANTIZED, *_DEVICES, *_STREAMED),
)
"""What the options keep among themselves, with the pattern read as `units`."""


def check_prune(job: PruneJob) -> passes.Pass:
    """Refuses what can be refused without opening the model.

    Args:
      job: what was asked for.

    Returns:
      What its words mean.

    Raises:
      ValueError: a rule is broken; the sentence names the option.
    """
    chosen = check_pruning(job)
    # Last, since it looks at the disk.
    text_files.check_text_files(
        (*job.calibration.files, *job.evaluation.evaluate, *job.recovery.trained_files)
    )
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
    return chosen


def check_pruning(job: PruneJob, *, through_torch: bool = False) -> passes.Pass:
    """Refuses settings that do not agree, without looking at a file.

    Args:
      job: what was asked for.
      through_torch: whether the model is of no family of ours.

    Returns:
      What its words mean.

    Raises:
      ValueError: a rule is broken; the sentence names the option.
    """
    method = job.pruning.method or "sparsegpt"
    values = option_values(job) | {
        "method": method,
        "files": job.calibration.files,
        "self_sequences": job.calibration.self_sequences,
        "streams": job.streams,
        "through_torch": through_torch,
        "fewer_tokens": False,
    }
    check(WORDS, **values)
    # Only now, since these refuse what they cannot read.
    pattern = passes.choose_pattern(job.pruning)
    mesh = device_mesh(job.devices.mesh)
    check(
        RULES,
        **values | {"pattern": passes.pattern_word(pattern)},
        units=pattern,
        fixed=pattern.sparsity,
        device_count=None if mesh is None else mesh.size,
    )
    return passes.choose_pass(job)
