"""The options of `jaxprune prune`, and all that can be refused before it begins."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from jaxprune.cli import models, parse
from jaxprune.evaluation import texts
from jaxprune.formats import atomic, rewrite
from jaxprune.formats.checkpoint_dir import CheckpointDir
from jaxprune.masking import allocation as allocations
from jaxprune.masking import counts, patterns
from jaxprune.posttraining import methods
from jaxprune.typing import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(models.ModelOptions):
    """A pruning.

    Attributes:
      model: the directory of the model: config.json, *.safetensors, tokenizer.json.
      out: the directory to write, of the same form, with true zeros, jaxprune.json and
        report.html.
      method: magnitude looks at the weights alone; wanda and ria at the inputs' sizes
        too; sparsegpt and alps also update what stays, alps more thoroughly and slowly.
        magnitude without --calibration streams: any safetensors directory, in the
        memory of one tensor.
      sparsity: the share to remove, in [0, 1). To be left out with --pattern n:m.
      pattern: "per-layer" ranks the weights of a matrix together, "per-output" those of
        each output; "2:4" keeps 2 of each 4 along the input; "16x16" removes blocks.
        Each method has its own if left out.
      allocation: how the sparsity is shared out: layer (to each matrix the same), erk
        (by its shape), owl (layers with outliers keep more).
      calibration: texts that show what the weights are for: .txt, .md, .jsonl with a
        "text" in each line, or .npy of int32 token ids (sequences, length). Several are
        a mixture, the same number of sequences of each. A mixture of the kinds of text
        that the model is to be used on is worth more than any method: equal parts of
        two kinds, 64 sequences in all, did best in benchmarks/README.md.
      sequences: how many are calibrated on; --batch must divide it.
      length: tokens of a sequence, BOS included, and of a window in evaluation.
      seed: which sequences are drawn, what is sampled.
      batch: sequences that the model sees at once.
      damping: of sparsegpt and alps, as a share of the Hessian's mean diagonal.
      inputs: what a weight is pruned for: the inputs that are "left" by all that was
        pruned before it, or those of its "dense" layer, as the papers have it.
      exclude: globs of tensors to leave alone, as "*.down_proj.weight".
      evaluate: texts to measure the perplexity on, before and after. If left out, the
        last tenth of each calibration text, which then is not calibrated on.
      limit: windows of each text that are evaluated.
      any_perplexity: prune even a model that is worse than guessing by frequency.
      retrain_steps: steps of Adam afterwards on --retrain-text, the zeros staying
        zeros; only the pruned matrices are trained.
      retrain_text: texts to retrain on, as for --calibration.
      retrain_learning_rate: of the first step; it falls to nothing.
      prompt: of the samples before and after; the beginning of an evaluated text if
        left out.
      prompt_steps: tokens of a sample; 0 for none.
      overwrite: replace an earlier result.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    method: methods.Name = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    allocation: allocations.Name = "layer"
    calibration: tuple[Path, ...] = ()
    sequences: int = 64
    length: int = 512
    seed: int = 0
    batch: int = 4
    damping: float | None = None
    inputs: methods.Inputs = "left"
    exclude: tuple[str, ...] = ()
    evaluate: tuple[Path, ...] = ()
    limit: int = 16
    any_perplexity: bool = False
    retrain_steps: int = 0
    retrain_text: tuple[Path, ...] = ()
    retrain_learning_rate: float = 3e-5
    prompt: str | None = None
    prompt_steps: int = 48
    overwrite: bool = False

    @property
    def streams(self) -> bool:
        """Whether the model is pruned tensor by tensor, without its code."""
        return self.method == "magnitude" and not self.calibration

    @property
    def work(self) -> Path:
        """Where a run that is not done keeps what it has."""
        out = self.out.resolve()
        return out.with_name(f".{out.name}.work")


class Meaning(NamedTuple):
    """What a job's words mean.

    Attributes:
      method: how a matrix is pruned.
      pattern: which weights are pruned together.
      sparsity: the share to remove.
      allocation: how the sparsity is shared out.
    """

    method: methods.Method
    pattern: Pattern
    sparsity: Any
    allocation: allocations.Rule


def check(job: Job) -> Meaning:
    """Refuses what can be refused without opening the model; what its words mean."""
    method = parse.method(job.method, job.damping, job.inputs)
    pattern = method.pattern if job.pattern is None else patterns.named(job.pattern)
    sparsity, rule = counts.agreed(job.sparsity, pattern, job.allocation)
    parse.check_at_least_one(
        sequences=job.sequences, batch=job.batch, limit=job.limit, length=job.length
    )
    if job.length < 8:
        raise ValueError(f"--length must be at least 8 tokens, got {job.length}")
    if job.sequences % job.batch:
        raise ValueError(
            f"--sequences must be divisible by --batch, got {job.sequences} and "
            f"{job.batch}; all batches have one shape"
        )
    if min(job.retrain_steps, job.prompt_steps) < 0:
        raise ValueError(
            "--retrain-steps and --prompt-steps must not be negative, got "
            f"{job.retrain_steps} and {job.prompt_steps}"
        )
    if not job.calibration and not job.streams:
        raise ValueError(
            f"--method {job.method} needs --calibration FILE..., a text of the kind "
            "that the model is used on; only magnitude does without"
        )
    parse.check_seed(job.seed)
    _check_retraining(job)
    if job.streams:
        _check_streaming(job, pattern, rule)
    texts.check_files((*job.calibration, *job.evaluate, *job.retrain_text))
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
    return Meaning(method, pattern, sparsity, rule)


def check_room(job: Job, source: CheckpointDir) -> None:
    """Refuses, before a long job, a disk without room for the result and progress."""
    before = [job.work, job.out.resolve().with_name(f".{job.out.name}.partial")]
    have = sum(map(atomic.bytes_in, before))
    atomic.check_room(job.out, source.size * (1 if job.streams else 2) - have)


def _check_retraining(job: Job) -> None:
    if bool(job.retrain_steps) != bool(job.retrain_text):
        raise ValueError(
            "--retrain-steps and --retrain-text belong together, got "
            f"{job.retrain_steps} steps and {len(job.retrain_text)} texts"
        )
    if job.retrain_steps and not 0 < job.retrain_learning_rate < 1:
        raise ValueError(
            "--retrain-learning-rate must be in (0, 1), got "
            f"{job.retrain_learning_rate}"
        )


def _check_streaming(job: Job, pattern: Pattern, rule: allocations.Rule) -> None:
    known = (patterns.Unstructured, patterns.PerOutput, patterns.NM)
    wrong = [
        name
        for name, given in (
            (f"--allocation {job.allocation}", rule != allocations.Uniform()),
            (f"--pattern {job.pattern}", not isinstance(pattern, known)),
            ("--retrain-steps", job.retrain_steps > 0),
        )
        if given
    ]
    if wrong:
        raise ValueError(
            f"magnitude without --calibration does no {', '.join(wrong)}; give "
            "--calibration FILE..., which loads the model"
        )
