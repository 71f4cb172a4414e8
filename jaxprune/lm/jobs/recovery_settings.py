"""The settings of the training that makes up for what went, and their rules."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from jaxprune.arrays.rules import Rule, within
from jaxprune.lm.jobs.option_rules import at_least, idle_without, open_share
from jaxprune.lm.jobs.option_types import (
    UNSET,
    Files,
    MaybeCount,
    MaybeNumber,
    MaybePath,
    Number,
    choice_of,
)
from jaxprune.lm.jobs.settings import SELF, Calibration

TOP = 64
"""Likeliest tokens of a prediction that a distillation keeps."""

Trained: TypeAlias = Literal["all", "matrices", "norms", "lora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """Training afterwards that makes up for what was removed.

    Where embedding and head are not trained, a step computes the logits of the tokens
    that its sequences and their kept predictions name, and of a sample that stands for
    all others.

    Attributes:
      recover_steps: steps of Adam afterwards; zeros stay zeros, and sizes stay as they
        are. 0 does not train; nor does leaving it out, but for prune --effort best.
      recover_by: "distillation" brings the next-token distributions of what is left
        back to those of the model before (KL divergence); "retraining" learns to
        predict the texts.
      recover_batch: sequences of a step; those of --batch if left out.
      recover_text: texts for that; those that are calibrated on if left out. The word
        "self" beside them stands for what --calibration self wrote, in as many
        sequences as each text has.
      recover_learning_rate: the highest learning rate, reached in a twentieth of the
        steps; it then falls to zero. If left out, 0.002 times the root mean square of
        what is trained, for each tensor, experts of a layer together; 3e-5 for lora.
      recover_train: what is trained: all parameters, the matrices that were pruned (of
        a smaller model, those of its layers), norms and biases, or those matrices by
        changes of rank 16 (lora). If left out, all parameters by distillation, the
        matrices by retraining.
      recover_hidden: the weight of the last hidden states in the loss of a
        distillation, where the predictions weigh 1: their squared distance over the
        dense ones' squared norm.
      recover_top: how many of the likeliest tokens of each of the dense model's
        predictions a distillation keeps on disk, 64 if left out, with the sum of all
        others: the dense model then runs once, and pruning does not hold it. 0 runs it
        in every step and takes all of its predictions, as --recover-hidden does.
      recover_text_share: how much of the loss of a distillation is learning to predict
        the texts, from 0 to 1; what the model wrote itself is distilled alone.
      recover_teacher: the directory of the model whose predictions a distillation
        follows, with the same tokens: that before an earlier job, or a larger one. The
        model before this job if left out.
    """

    recover_steps: MaybeCount = None
    recover_by: Literal["distillation", "retraining"] = "distillation"
    recover_batch: MaybeCount = None
    recover_text: Files = ()
    recover_learning_rate: MaybeNumber = None
    recover_train: Annotated[Trained | None, choice_of(Trained), UNSET] = None
    recover_hidden: Number = 0.0
    recover_top: MaybeCount = None
    recover_text_share: Number = 0.0
    recover_teacher: MaybePath = None

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.recover_steps or 0

    @property
    def trained_files(self) -> tuple[Path, ...]:
        """The texts that are trained on, without what the model writes itself."""
        return tuple(path for path in self.recover_text if path != SELF)

    @property
    def own_text(self) -> bool:
        """Whether what the model wrote itself is trained on too."""
        return SELF in self.recover_text

    @property
    def top(self) -> int:
        """Number of tokens that are kept of a prediction; 0 where none is kept."""
        if not self.recover_steps or self.recover_by != "distillation":
            return 0
        if self.recover_hidden:  # its loss reads the dense model's states
            return 0
        return TOP if self.recover_top is None else self.recover_top

    @property
    def learning_rate(self) -> float:
        """The highest learning rate."""
        usual = 2e-3 if self.relative else 3e-5
        return self.recover_learning_rate or usual

    @property
    def relative(self) -> bool:
        """Whether that of a leaf is so many times its root mean square."""
        # A factor of a matrix's change begins at zero.
        return self.recover_learning_rate is None and self.trained != "lora"

    def batch(self, calibration: Calibration) -> int:
        """Number of sequences of a step."""
        return self.recover_batch or calibration.batch

    def followed_tokens(self, trained_tokens: int, written_tokens: int) -> int:
        """Number of tokens whose predictions are kept.

        Args:
          trained_tokens: number of tokens that are trained on, of the texts.
          written_tokens: number of tokens that the model wrote itself, each predicted
            once however often it is trained on.

        Returns:
          Their number.
        """
        share = math.ceil(trained_tokens / max(1, len(self.trained_files)))
        own = min(written_tokens, share) if self.own_text else 0
        return own + (trained_tokens if self.recover_text_share < 1 else 0)

    @property
    def trained(self) -> Trained:
        """Which parameters are trained."""
        usual: Trained = "all" if self.recover_by == "distillation" else "matrices"
        return self.recover_train or usual

    @property
    def stage(self) -> str:
        """What the model then is."""
        return {"distillation": "distilled", "retraining": "retrained"}[self.recover_by]


_STEPS = "--recover-steps N"

RULES = (
    at_least("recover_steps", 0),
    Rule(
        lambda v: not v.recover_steps or v.recover_text or v.files,
        "--recover-steps needs --recover-text FILE..., or --calibration FILE..., "
        "whose texts it then takes",
    ),
    at_least("recover_batch", 1),
    open_share("recover_learning_rate"),  # Adam's, which moves each weight so far
    within(
        "recover_hidden",
        0,
        sys.float_info.max,
        "--recover-hidden must be at least 0, got {recover_hidden}",
    ),
    # An option that would do nothing was meant to do something.
    *(
        idle_without(Recovery, option, "recover_steps", _STEPS)
        for option in (
            *("recover_text", "recover_train", "recover_hidden", "recover_batch"),
            *("recover_learning_rate", "recover_by", "recover_top"),
            *("recover_text_share", "recover_teacher"),
        )
    ),
    Rule(
        lambda v: v.recover_teacher is None or v.recover_by == "distillation",
        "--recover-teacher is followed by a distillation, so it needs --recover-by "
        "distillation",
    ),
    Rule(
        lambda v: not v.recover_hidden or v.recover_by == "distillation",
        "--recover-hidden compares with the model before, so it needs --recover-by "
        "distillation",
    ),
    at_least("recover_top", 0),
    Rule(
        lambda v: v.recover_top is None or v.recover_by == "distillation",
        "--recover-top is of the dense model's predictions, so it needs --recover-by "
        "distillation",
    ),
    within(
        "recover_text_share",
        0,
        1,
        "--recover-text-share must be from 0 to 1, got {recover_text_share}",
    ),
    Rule(
        lambda v: v.recover_by == "distillation" or not v.recover_text_share,
        "--recover-text-share is beside the dense model's predictions, so it needs "
        "--recover-by distillation",
    ),
    Rule(
        lambda v: (
            not v.recover_text_share or (v.recover_top != 0 and not v.recover_hidden)
        ),
        "--recover-text-share stands beside predictions that are kept; leave "
        "--recover-hidden out, and --recover-top at 1 or more",
    ),
    Rule(
        lambda v: SELF not in v.recover_text or SELF in v.calibration,
        "--recover-text self is what --calibration self wrote; give that too",
    ),
    Rule(
        lambda v: len(set(v.recover_text)) == len(v.recover_text),
        "each --recover-text must be given once, got {recover_text}",
        details=lambda v: {"recover_text": " ".join(map(str, v.recover_text))},
    ),
    Rule(
        # Then no sequence would follow the dense model.
        lambda v: v.recover_text_share < 1 or SELF in v.recover_text,
        "--recover-text-share 1 learns the texts and follows nothing; give "
        "--recover-by retraining, or self beside --recover-text",
    ),
    Rule(
        lambda v: set(v.recover_text) != {SELF},
        "--recover-text self stands beside texts; give a FILE too",
    ),
    Rule(
        # To learn what the model wrote itself would sharpen what it predicts; with
        # other tokens no prediction of the dense model can be followed.
        lambda v: (
            SELF not in v.recover_text
            or v.recover_by == "distillation"
            or v.fewer_tokens
        ),
        "--recover-text self is followed, not learned, so it needs --recover-by "
        "distillation",
    ),
    Rule(
        lambda v: not (v.recover_hidden and v.recover_top),
        "--recover-hidden compares with the dense model's states, which --recover-top "
        "does not keep; leave one out",
    ),
)
"""What these options keep, beside those of calibration: `settings.RULES` says which
values they read."""
