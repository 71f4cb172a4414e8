"""`jaxprune prune`, `shrink`, `trim` and `recover`: each a step of `jaxprune.lm`."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jaxprune.lm.cli import launch, summary
from jaxprune.lm.cli.options import Options
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import Job, PruneJob, RecoverJob, ShrinkJob, TrimJob
from jaxprune.lm.steps.skeleton import run_job
from jaxprune.lm.torch_models.choosing import prepare_step


def _run(
    job: Job,
    console: Console,
    words: list[str],
    lines: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any]:
    """Does the step; the record."""
    record = run_job(prepare_step, job, console, summary.command_line(words))
    done = [] if job.plan else lines(record)
    return summary.say_done(job, record, done, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(PruneJob, Options):
    """Prunes a model and writes it as a directory that every loader reads.

    All options and files are checked first. Then the dense model is measured, with a
    warning where it is worse than guessing. The same command resumes a run that was
    killed; --plan says what would be done.
    """

    EXAMPLE: ClassVar = (
        "jaxprune prune MODEL OUT --sparsity 0.5 --calibration prose.txt code.jsonl"
    )

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Prunes the model; the record."""
        with launch.join_processes(self.pruning.distributed, console, words):
            return _run(self, console, words, summary.prune_lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(ShrinkJob, Options):
    """Removes layers, experts, heads and neurons; leaves a smaller model.

    All layers lose as many heads and neurons, since config.json has one number for all;
    which ones differs by layer. Without --calibration the sizes of the weights decide.
    With it, the neurons and heads whose absence costs least are removed, layer after
    layer, and the weights that stay are updated. The same command resumes a run that
    was killed; --plan says what would be done.
    """

    EXAMPLE: ClassVar = (
        "jaxprune shrink MODEL OUT --ffn 0.5 --calibration prose.txt code.jsonl"
    )

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Shrinks the model; the record."""
        return _run(self, console, words, summary.shrink_lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trim(TrimJob, Options):
    """Removes tokens from the vocabulary; leaves a smaller embedding, head, tokenizer.

    Those stay that --calibration has most and that the model expects along it, and
    what any text needs. Their weights stay as they are, bit for bit.
    """

    EXAMPLE: ClassVar = "jaxprune trim MODEL OUT --tokens 16384 --calibration prose.txt"

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Trims the vocabulary; the record."""
        return _run(self, console, words, summary.shrink_lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recover(RecoverJob, Options):
    """Trains a pruned or smaller model on, towards the model before; zeros stay zeros.

    The same command resumes a run that was killed; --plan says what would be done.
    """

    EXAMPLE: ClassVar = (
        "jaxprune recover PRUNED OUT --teacher MODEL --calibration prose.txt"
    )

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Trains the model; the record."""
        return _run(self, console, words, summary.recover_lines)
