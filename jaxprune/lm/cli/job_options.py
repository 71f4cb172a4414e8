"""What `prune` and `shrink` share: a model, its texts, how the result is trained."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import tyro

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.cli import models, parse
from jaxprune.lm.texts import text_files

SELF = Path("self")
"""In the place of a calibration text: what the model writes itself."""

Trained: TypeAlias = Literal["all", "matrices", "norms", "lora"]


class Recovery(NamedTuple):
    """A training that makes up for what was removed.

    Attributes:
      kind: also its name in jaxprune.json.
      steps: how many.
      texts: what it reads; those that are calibrated on if there are none.
      learning_rate: of the first step.
      trained: which parameters.
      hidden: the weight of the last hidden states, of a distillation.
    """

    kind: Literal["retraining", "distillation"]
    steps: int
    texts: tuple[Path, ...]
    learning_rate: float
    trained: Trained
    hidden: float = 0.0

    @property
    def stage(self) -> str:
        """What the model then is."""
        return "retrained" if self.kind == "retraining" else "distilled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOptions(models.ModelOptions):
    """A directory that is made of another one, with a look at texts.

    Attributes:
      model: the directory of the model: config.json, *.safetensors, tokenizer.json.
      out: the directory to write, of the same form, with jaxprune.json and report.html.
      calibration: texts that show what the model is for: .txt, .md; .jsonl or .parquet
        with a "text" in each line or row, or "messages", which the model's chat
        template writes; or .npy of int32 token ids (sequences, length). Several are a
        mixture with as many sequences of each. Give each kind of text that the model is
        for: that is worth more than the choice of a method (benchmarks/README.md). The
        word "self" stands for text that the model writes, with `prune` alone.
      sequences: how many sequences are calibrated on.
      length: tokens of a sequence, BOS included, and of a window in evaluation; the
        model's context where that is less.
      seed: decides which sequences are drawn and what is sampled.
      batch: how many sequences the model sees at once.
      evaluate: texts to measure the perplexity on, before and after. If left out, the
        last tenth of each calibration text, which then is not calibrated on.
      limit: how many windows of each text are evaluated.
      any_perplexity: go on even with a model that is worse than guessing by frequency.
      distill_steps: steps of Adam afterwards that bring the next-token distributions
        of what is left back to those of the model before (KL divergence); zeros stay
        zeros, and sizes stay as they are.
      distill_text: texts for that; those that are calibrated on if left out.
      distill_learning_rate: the learning rate of the first step; it falls to zero.
      distill_train: what is trained: all parameters, the matrices that were pruned (of
        a smaller model, those of its layers), norms and biases, or those matrices by
        changes of rank 16 (lora).
      distill_hidden: the weight of the last hidden states in the loss, where the
        predictions weigh 1: their squared distance over the dense ones' squared norm.
      plan: say what would be done, with how much memory, disk and time, and write
        nothing.
      overwrite: replace an earlier result.
    """

    GROUPS: ClassVar = {
        "calibration": ("calibration", "sequences", "length", "seed", "batch"),
        "evaluation": ("evaluate", "limit", "any_perplexity"),
        "distillation": (
            "distill_steps",
            "distill_text",
            "distill_learning_rate",
            "distill_train",
            "distill_hidden",
        ),
    }

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    calibration: tuple[Path, ...] = ()
    sequences: int = 64
    length: int = 512
    seed: int = 0
    batch: int = 4
    evaluate: tuple[Path, ...] = ()
    limit: int = 16
    any_perplexity: bool = False
    distill_steps: int = 0
    distill_text: tuple[Path, ...] = ()
    distill_learning_rate: float = 3e-5
    distill_train: Trained = "all"
    distill_hidden: float = 0.0
    plan: bool = False
    overwrite: bool = False

    @property
    def calibration_files(self) -> tuple[Path, ...]:
        """The texts that are calibrated on, without what the model writes itself."""
        return tuple(path for path in self.calibration if path != SELF)

    @property
    def own_sequences(self) -> int:
        """How many of the sequences the model writes itself; the last kind of text."""
        if SELF not in self.calibration:
            return 0
        return self.sequences // (1 + len(self.calibration_files))

    @property
    def work(self) -> Path:
        """Where a run that is not done keeps what it has."""
        out = self.out.resolve()
        return out.with_name(f".{out.name}.work")

    @property
    def recovery(self) -> Recovery | None:
        """How the result is trained on, or None."""
        if not self.distill_steps:
            return None
        return Recovery(
            "distillation",
            self.distill_steps,
            self.distill_text or self.calibration_files,
            self.distill_learning_rate,
            self.distill_train,
            self.distill_hidden,
        )


def check(job: JobOptions) -> None:
    """Refuses what can be refused without opening the model."""
    parse.check_at_least_one(
        sequences=job.sequences, batch=job.batch, limit=job.limit, length=job.length
    )
    if job.length < 8:
        raise ValueError(f"--length must be at least 8 tokens, got {job.length}")
    parse.check_seed(job.seed)
    if job.distill_steps < 0:
        raise ValueError(
            f"--distill-steps must not be negative, got {job.distill_steps}"
        )
    if job.distill_steps and not (job.distill_text or job.calibration_files):
        raise ValueError(
            "--distill-steps needs --distill-text FILE..., or --calibration FILE..., "
            "whose texts it then takes"
        )
    if not 0 < job.distill_learning_rate < 1:
        raise ValueError(
            f"--distill-learning-rate must be in (0, 1), got "
            f"{job.distill_learning_rate}"
        )
    if not 0 <= job.distill_hidden < math.inf:
        raise ValueError(
            f"--distill-hidden must be at least 0, got {job.distill_hidden}"
        )
    idle = ("distill_text", "distill_train", "distill_hidden", "distill_learning_rate")
    parse.check_idle(job, "--distill-steps N", job.distill_steps, *idle)
    if job.calibration.count(SELF) > 1:
        raise ValueError("--calibration self is given twice; once is enough")
    text_files.check_text_files(
        (*job.calibration_files, *job.evaluate, *job.distill_text)
    )
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
