"""The options of `jaxprune prune`, and all that can be refused before it begins."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from jaxprune.lm.cli import job_options, launch, models, parse
from jaxprune.lm.cli.job_options import SELF
from jaxprune.lm.texts import text_files
from jaxprune.masking import allocation as allocations
from jaxprune.masking import counts, patterns
from jaxprune.posttraining import passes
from jaxprune.posttraining.passes.base import Inputs
from jaxprune.posttraining.passes.pruning import Name
from jaxprune.posttraining.passes.refinement import Refine
from jaxprune.posttraining.solvers.quantization import Quantization
from jaxprune.typing import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_options.JobOptions, launch.ProcessOptions):
    """A pruning.

    Without --calibration all methods but magnitude look at what the model writes
    itself, as with --calibration self.

    Attributes:
      method: magnitude looks at the weights alone; wanda and ria at the inputs' sizes
        too; sparsegpt and alps also update the weights that stay, alps better and more
        slowly. magnitude without --calibration goes through any safetensors directory
        in the memory of one tensor. If left out, sparsegpt for the families of
        docs/command.md; magnitude for others, which take no text and no option that
        runs the model.
      sparsity: the share to remove, in [0, 1). Leave it out with --pattern n:m.
      pattern: "unstructured" ranks the weights of a matrix together, "per-output" those
        of each output; "2:4" keeps 2 of each 4 along the input; "16x16" removes blocks.
        If left out, per-output for wanda and unstructured for the others.
      allocation: how the sparsity is shared out: layer (to each matrix the same),
        global (one ranking of all magnitudes), erk (by its shape), owl (layers with
        outliers keep more). Shares by name are for Python.
      damping: the damping of sparsegpt and alps, as a share of the Hessian's mean
        diagonal; 0.01 if left out.
      calibration_temperature: the temperature of what the model writes for
        --calibration self.
      inputs: which inputs a weight is pruned for: those that the layers pruned before
        it produce ("left"), or those of the dense layer ("dense"), as in the papers.
      relative: divide each token by the size of its activations, so that a few massive
        ones do not decide; yes if left out. The papers do not.
      correction: how much of what the layers before it lost each matrix makes up for,
        in [0, 1], by sparsegpt and alps; 0.5 if left out, without --inputs dense. The
        papers have 0.
      bits: round the weights that stay to integers of 4 or 8 bits, with a scale for
        each output and --group inputs: `jaxprune compact` then stores so few bits of
        each. sparsegpt and alps make up for the rounding. The directory holds them as
        before, in the model's dtype.
      group: inputs that share a scale with --bits, a multiple of 16.
      exclude: names of tensors to leave alone, also as globs: "*.down_proj.weight".
      refine: passes over the calibration sequences, after each layer is pruned, that
        bring its output back to that of the dense layer by gradient steps on its kept
        weights, norms and biases; zeros stay zeros. A tenth of the sequences, which
        are not trained on, says which pass is kept. 0 does nothing.
      refine_learning_rate: the learning rate of the first step; it falls to zero.
      retrain_steps: steps of Adam afterwards on --retrain-text, the zeros staying
        zeros; only the pruned matrices are trained.
      retrain_text: texts to retrain on, as for --calibration.
      retrain_learning_rate: the learning rate of the first step; it falls to zero.
      prompt: the prompt of the samples before and after; the beginning of an evaluated
        text if left out.
      prompt_steps: how many tokens a sample has; 0 makes none.
    """

    GROUPS: ClassVar = {
        "pruning": ("method", "sparsity", "pattern", "allocation", "exclude"),
        "method": (
            *("damping", "inputs", "relative", "correction"),
            *("refine", "refine_learning_rate"),
        ),
        "rounding": ("bits", "group"),
        "calibration": ("calibration_temperature",),
        "evaluation": ("prompt", "prompt_steps"),
        "retraining": ("retrain_steps", "retrain_text", "retrain_learning_rate"),
    }
    EXAMPLE: ClassVar = (
        "jaxprune prune MODEL OUT --sparsity 0.5 --calibration prose.txt code.jsonl"
    )

    method: Name | None = None
    sparsity: float | None = None
    pattern: str | None = None
    allocation: Literal["layer", "global", "erk", "owl"] = "layer"
    damping: float | None = None
    inputs: Inputs = "left"
    relative: Literal["yes", "no"] | None = None
    correction: float | None = None
    bits: Literal[4, 8] | None = None
    group: int = 128
    exclude: tuple[str, ...] = ()
    calibration_temperature: float = 1.0
    refine: int = 0
    refine_learning_rate: float = 1e-4
    retrain_steps: int = 0
    retrain_text: tuple[Path, ...] = ()
    retrain_learning_rate: float = 3e-5
    prompt: str | None = None
    prompt_steps: int = 48

    @property
    def streams(self) -> bool:
        """Whether the model is pruned tensor by tensor, without its code."""
        return self.method == "magnitude" and not self.calibration

    def calibrated(self) -> "Job":
        """The job with what the model writes itself in the place of no text."""
        if self.calibration or self.streams:
            return self
        return dataclasses.replace(self, calibration=(SELF,))

    @property
    def refinement(self) -> Refine | None:
        """How each layer is refined, or None."""
        if not self.refine:
            return None
        return Refine(passes=self.refine, learning_rate=self.refine_learning_rate)

    @property
    def rounding(self) -> Quantization | None:
        """The levels of the weights that stay, or None."""
        return None if self.bits is None else Quantization(self.bits, self.group)

    @property
    def recovery(self) -> job_options.Recovery | None:
        """How the pruned model is trained on, or None."""
        if not self.retrain_steps:
            return super().recovery
        return job_options.Recovery(
            "retraining",
            self.retrain_steps,
            self.retrain_text,
            self.retrain_learning_rate,
            "matrices",
        )


class Meaning(NamedTuple):
    """What a job's words mean.

    Attributes:
      method: how a matrix is pruned.
      pattern: which weights are pruned together.
      sparsity: the share to remove.
      allocation: how the sparsity is shared out.
    """

    method: passes.Chain
    pattern: Pattern
    sparsity: Any
    allocation: allocations.Rule


def check(job: Job) -> Meaning:
    """Refuses what can be refused without opening the model; what its words mean."""
    name = job.method or "sparsegpt"
    method = parse.method(
        name,
        job.damping,
        job.inputs,
        relative=None if job.relative is None else job.relative == "yes",
        correction=job.correction,
    )
    usual = method.pruning.usual_pattern
    pattern = usual if job.pattern is None else patterns.parse(job.pattern)
    sparsity, rule = counts.agreed(job.sparsity, pattern, job.allocation)
    job_options.check(job)
    if not job.streams and job.sequences % job.batch:
        raise ValueError(
            f"--sequences must be divisible by --batch, got {job.sequences} and "
            f"{job.batch}; all batches have one shape"
        )
    if min(job.retrain_steps, job.prompt_steps, job.refine) < 0:
        raise ValueError(
            "--retrain-steps, --prompt-steps and --refine must not be negative, got "
            f"{job.retrain_steps}, {job.prompt_steps} and {job.refine}"
        )
    _check_own(job)
    for needed, on, option in (
        ("--refine N", job.refine, "refine_learning_rate"),
        ("--retrain-steps N", job.retrain_steps, "retrain_learning_rate"),
        ("--bits N, whose scales it is for", job.bits, "group"),
        ("--calibration self", job.own_sequences, "calibration_temperature"),
    ):
        parse.check_idle(job, needed, on, option)
    _check_retraining(job)
    _check_rounding(job, pattern)
    _check_devices(job)
    if job.streams:
        _check_streaming(job, pattern, rule)
    text_files.check_text_files(job.retrain_text)
    return Meaning(method, pattern, sparsity, rule)


def _check_devices(job: Job) -> None:
    """Refuses a mesh that takes no batch each, and what several processes do not do."""
    mesh = models.device_mesh(job)
    if mesh is not None and (job.sequences // job.batch) % mesh.size:
        raise ValueError(
            f"each of the {mesh.size} devices of --mesh {job.mesh} takes a batch, so "
            f"--sequences must be divisible by {mesh.size} x --batch {job.batch}, got "
            f"{job.sequences}; give other numbers, or a smaller mesh"
        )
    if mesh is not None and job.refine:
        raise ValueError("--refine takes one batch after the other, so no --mesh")
    if job.coordinator is None:
        return
    if mesh is None:
        raise ValueError("--coordinator needs a --mesh of all devices, got none")
    wrong = [
        name
        for name, given in (
            ("--calibration self", job.own_sequences > 0),
            ("--retrain-steps", job.retrain_steps > 0),
            ("--distill-steps", job.distill_steps > 0),
            ("magnitude without --calibration", job.streams),
        )
        if given
    ]
    if wrong:
        raise ValueError(
            f"several processes do no {', '.join(wrong)}; leave --coordinator out"
        )


def _check_own(job: Job) -> None:
    """Refuses settings of what is made of the model itself."""
    if job.own_sequences == 0 and SELF in job.calibration:
        raise ValueError(
            f"--sequences {job.sequences} must be enough for each calibration text and "
            "self; give more"
        )
    if not 0 <= job.calibration_temperature < math.inf:
        raise ValueError(
            "--calibration-temperature must be 0 or more, got "
            f"{job.calibration_temperature}"
        )
    if job.refinement is not None:  # which refuses its own numbers
        try:
            job.refinement.split(job.sequences // job.batch)
        except ValueError:
            raise ValueError(
                f"--refine needs --sequences of at least twice --batch {job.batch}, "
                f"got {job.sequences}; a tenth of them measures"
            ) from None


def _check_retraining(job: Job) -> None:
    if bool(job.retrain_steps) != bool(job.retrain_text):
        raise ValueError(
            "--retrain-steps and --retrain-text belong together, got "
            f"{job.retrain_steps} steps and {len(job.retrain_text)} texts"
        )
    if job.retrain_steps and job.distill_steps:
        raise ValueError(
            "--retrain-steps and --distill-steps exclude each other; give one"
        )
    if job.retrain_steps and not 0 < job.retrain_learning_rate < 1:
        raise ValueError(
            "--retrain-learning-rate must be in (0, 1), got "
            f"{job.retrain_learning_rate}"
        )


def _check_rounding(job: Job, pattern: Pattern) -> None:
    """Refuses what would move weights off their levels."""
    if job.rounding is None:
        return
    if (job.method or "sparsegpt") == "sparsegpt":
        job.rounding.block(pattern)
    wrong = [
        name
        for name, steps in (
            ("--refine", job.refine),
            ("--retrain-steps", job.retrain_steps),
            ("--distill-steps", job.distill_steps),
        )
        if steps
    ]
    if wrong:
        raise ValueError(
            f"--bits comes last, so it takes no {', '.join(wrong)}, which would move "
            "the weights off their levels; leave one of them out"
        )


def _check_streaming(job: Job, pattern: Pattern, rule: allocations.Rule) -> None:
    known = (patterns.Unstructured, patterns.PerOutput, patterns.NM)
    wrong = [
        name
        for name, given in (
            (f"--allocation {job.allocation}", rule != allocations.Layer()),
            (f"--pattern {job.pattern}", not isinstance(pattern, known)),
            ("--bits", job.bits is not None),
            ("--prompt", job.prompt is not None),
            # 0 asks for no prompt, and there is none.
            ("--prompt-steps", job.prompt_steps not in (0, Job.prompt_steps)),
            ("--refine", job.refine > 0),
            ("--retrain-steps", job.retrain_steps > 0),
            ("--distill-steps", job.distill_steps > 0),
        )
        if given
    ]
    if wrong:
        raise ValueError(
            f"magnitude without --calibration does no {', '.join(wrong)}; give "
            "--calibration FILE..., which loads the model, or leave it out"
        )
