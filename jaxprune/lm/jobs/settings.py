"""What jobs share: the settings of a model, its texts and its devices.

A job is a frozen dataclass of groups, and a group is a frozen dataclass of options. The
command shows each group under its title, and takes each option by its name alone.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from jaxprune.arrays.rules import Rule, within
from jaxprune.lm.jobs.option_rules import SEED, at_least, idle_without
from jaxprune.lm.jobs.option_types import (
    UNSET,
    Count,
    Files,
    MaybeText,
    ModelPath,
    Names,
    Number,
    OutPath,
    Switch,
    choice_of,
)

SELF = Path("self")
"""In the place of a calibration text: what the model writes itself."""

CONTEXT, WINDOWS = 512, 16
"""Of every subcommand that measures a perplexity: tokens of a window, windows of a
text. So the same model has the same perplexity on the same text in all of them."""

Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How the directory is read.

    Attributes:
      dtype: the dtype of parameters and products; as they are stored if left out.
      bos: begin each sequence of a text with the BOS token, whatever the directory
        says. If left out, the directory decides.
      no_bos: begin no sequence with it.
      ignore_config: attributes of config.json to read as if they were not there; an
        unknown one that could change what the model computes is refused otherwise.
    """

    dtype: Annotated[Dtype | None, choice_of(Dtype), UNSET] = None
    bos: Switch = False
    no_bos: Switch = False
    ignore_config: Names = ()


LoadingGroup: TypeAlias = Annotated[Loading, tyro.conf.arg(name="model")]
"""Beside the directory, which is called "model" too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What the model runs on.

    Attributes:
      mesh: devices to run on, "data=2,fsdp=4" say: each parameter is split over the
        devices of "fsdp" and repeated over those of "data". `prune` takes a batch of
        calibration on each device. The first device alone if left out.
    """

    mesh: MaybeText = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The texts that show what the model is for.

    Attributes:
      calibration: texts that show what the model is for: .txt, .md; .jsonl or .parquet
        with a "text" in each line or row, or "messages", which the model's chat
        template writes; or .npy of int32 token ids (sequences, length). Several are a
        mixture with as many sequences of each. Give each kind of text that the model is
        for: that is worth more than the choice of a method. The word "self" stands for
        text that the model writes, beginning with tokens of the texts beside it; what
        was calibrated on texts alone loses most on texts of other kinds.
      sequences: how many sequences are calibrated on.
      length: tokens of a sequence, BOS included; the model's context where that is
        less.
      seed: decides which sequences are drawn and what is sampled.
      batch: how many sequences the model sees at once.
      calibration_temperature: the temperature of what the model writes for
        --calibration self.
    """

    calibration: Files = ()
    sequences: Count = 64
    length: Count = 512
    seed: Count = 0
    batch: Count = 4
    calibration_temperature: Number = 1.0

    @property
    def files(self) -> tuple[Path, ...]:
        """The texts that are calibrated on, without what the model writes itself."""
        return tuple(path for path in self.calibration if path != SELF)

    @property
    def self_sequences(self) -> int:
        """Number of sequences that the model writes itself; the last of the texts."""
        if SELF not in self.calibration:
            return 0
        # A mixture has as many sequences of each of its texts.
        return self.sequences // (1 + len(self.files))

    @property
    def written_tokens(self) -> int:
        """Number of tokens that the model writes itself."""
        return self.self_sequences * self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the model is measured by, before and after.

    Attributes:
      evaluate: texts to measure the perplexity on, before and after. If left out, the
        last tenth of each calibration text, which then is not calibrated on.
      context: tokens of a window, BOS included; the model's context where that is less.
      limit: how many windows of each text are evaluated.
      any_perplexity: go on even with a model that is worse than guessing by frequency.
      metric: a measure of your own, MODULE:FUNCTION, of a model that goes through
        torch: called with the torch module and a list of batches of its arguments, it
        returns a number or {name: number}.
    """

    evaluate: Files = ()
    context: Count = CONTEXT
    limit: Count = WINDOWS
    any_perplexity: Switch = False
    metric: MaybeText = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A directory that is made of another one.

    Attributes:
      model: the directory of the model: config.json, *.safetensors, tokenizer.json.
      out: the directory to write, of the same form, with jaxprune.json and report.html.
      plan: say what would be done, with how much memory, disk and time, and write
        nothing.
      overwrite: replace an earlier result.
    """

    model: ModelPath
    out: OutPath
    plan: Switch = False
    overwrite: Switch = False

    @property
    def work(self) -> Path:
        """Where a run that is not done keeps what it has."""
        out = self.out.resolve()
        return out.with_name(f".{out.name}.work")


RULES = (
    *(at_least(option, 1) for option in ("sequences", "batch", "limit", "length")),
    at_least("length", 8, " tokens"),
    at_least("context", 2, " tokens"),
    SEED,
    Rule(
        lambda v: v.metric is None or v.through_torch,
        "--metric is for models that go through torch, which are those of no family of "
        "ours; leave it out",
    ),
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
    within(
        "calibration_temperature",
        0,
        sys.float_info.max,
        "--calibration-temperature must be 0 or more, got {calibration_temperature}",
    ),
    idle_without(
        Calibration,
        "calibration_temperature",
        "self_sequences",
        "--calibration self",
    ),
)
"""What every job's options keep; `files` are the calibration's without "self", and
`self_sequences` the number that it stands for; `fewer_tokens` is whether some go."""
