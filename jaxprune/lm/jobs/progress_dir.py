"""Where a run that is not done keeps what it has, so that it resumes after a kill."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.jobs import provenance
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.settings import Job
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure import machine
from jaxprune.posttraining import fingerprint

_BEGUN = "command.json"  # which job the progress is of
RECOVERY = "recovery"
"""Directory, in that of a job's progress, of what comes last."""
_RECOVERY_FACTS = ("recovery", "teacher", "trained")  # they decide nothing else


def refuse_done(job: Job, command: str) -> None:
    """Refuses to make again what this very command made."""
    if job.overwrite or not provenance.is_done(job.out, command):
        return
    with atomic.locked(job.work):
        if not _is_later(job.work / _BEGUN, job.out / rewrite.NAME):
            # What the run that made it left, killed at its very end.
            shutil.rmtree(job.work, ignore_errors=True)
    raise ValueError(
        f"'{job.out}' is whole, and this very command made it; give --overwrite to "
        "make it again, or another place"
    )


def check_room(
    job: PruneJob | ShrinkJob,
    source: CheckpointDir,
    copies: int,
    trained_tokens: int = 0,
) -> None:
    """Refuses, before a long job, a disk without room for the result and progress.

    Args:
      job: place of the result and of the progress, and the training whose progress
        takes room too.
      source: directory of the dense model.
      copies: number of copies of the model that are written, the result included.
      trained_tokens: number of tokens of all sequences that are trained on, of texts.

    Raises:
      OSError: the disk has less room.
    """
    out = job.out.resolve()
    # What an earlier run left there is written again, or replaced.
    before = [job.work, out.with_name(f".{out.name}.partial")]
    written = sum(map(atomic.bytes_in, before))
    needed = source.size * copies
    needed += recovery_bytes(job, source, trained_tokens)
    atomic.check_room(job.out, needed - written)


def recovery_bytes(
    job: PruneJob | ShrinkJob, source: CheckpointDir, trained_tokens: int
) -> int:
    """Bytes that the dense model's predictions and two checkpoints may take."""
    recovery, written = job.recovery, job.calibration.written_tokens
    # float32 and int32 of each token, and float32 of all others together.
    token_bytes = 8 * recovery.top + 4 if recovery.top else 0
    predictions = recovery.followed_tokens(trained_tokens, written) * token_bytes
    if not recovery.recover_steps or recovery.trained == "norms":
        return predictions
    # In float32 the weights; AdamW's moments are of small factors under "lora".
    weight_bytes = 4 if recovery.trained == "lora" else 12
    shapes = [info.shape for info in source.tensors.values()]
    if recovery.trained != "all":  # neither embedding nor head
        vocabulary = source.config.get("vocab_size")
        shapes = [s for s in shapes if len(s) > 1 and vocabulary not in s]
    return predictions + 2 * weight_bytes * sum(map(math.prod, shapes))


def job_facts(
    job: PruneJob | ShrinkJob, source: CheckpointDir, texts: JobTexts
) -> dict[str, Any]:
    """What decides the result of any job, known without reading a weight.

    Args:
      job: what was asked for.
      source: directory of the dense model, whose files are told by size and time.
      texts: texts that the job reads.

    Returns:
      A JSON-able record; a run goes on only with the progress of an equal one.
    """
    recovery, evaluation = job.recovery, job.evaluation
    facts: dict[str, Any] = {}
    if recovery.recover_steps:
        # Texts, and the rows of them that are drawn.
        facts["trained"] = fingerprint.of_arrays([texts.training])
    if recovery.recover_teacher is not None:
        facts["teacher"] = _times(open_directory(recovery.recover_teacher))
    return facts | {
        # Half by one method and half by its next release would be neither's.
        "jaxprune": machine.versions().get("jaxprune"),
        "model": str(source.path),
        "files": _times(source),
        "ignored_config": list(job.loading.ignore_config),
        "dtype": job.loading.dtype,
        "calibration": [text.sha256 for text in texts.calibration],
        "held_out": 0 if evaluation.evaluate else evaluation.limit * evaluation.context,
        "sequences": job.calibration.sequences,
        "length": job.calibration.length,
        "batch": job.calibration.batch,
        "seed": job.calibration.seed,
        "self": [
            job.calibration.self_sequences,
            job.calibration.calibration_temperature,
        ],
        "bos": texts.begins.why,
        # A default that is written out is the same job.
        "recovery": [str(dataclasses.replace(recovery, recover_top=recovery.top))]
        if recovery.recover_steps
        else None,
    }


def _times(source: CheckpointDir) -> dict[str, list[int]]:
    """Sizes and times of the files that decide what a model computes and writes.

    To hash weights would take as long as to read them.
    """
    configs = [n for n in source.others if n.endswith((".json", ".jinja"))]
    stats = {n: (source.path / n).stat() for n in sorted([*source.metadata, *configs])}
    return {n: [stat.st_size, stat.st_mtime_ns] for n, stat in stats.items()}


@contextlib.contextmanager
def hold_progress(work: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keeps the place of the progress for this run, and for this job.

    A job whose recovery alone is another one goes on with all that comes before it.

    Args:
      work: place of the progress.
      facts: what decides the job's result, JSON-able.

    Yields:
      Nothing; the place is removed when the run ends well, or did nothing.

    Raises:
      ValueError: the progress there is another job's.
    """
    begun = work / _BEGUN
    with atomic.locked(work):
        try:
            # Nothing was done yet, so the place is free for any job.
            if not _has_progress(work):
                begun.unlink(missing_ok=True)
            elif _has_other_recovery(begun, facts):
                shutil.rmtree(work / RECOVERY, ignore_errors=True)
                atomic.replace_json(begun, dict(facts))
            atomic.begin_or_resume(begun, facts)
            yield
        except BaseException:
            if not _has_progress(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _has_other_recovery(begun: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a job that was begun differs in its recovery, and in nothing else."""
    if not begun.exists():
        return False
    old = read_json(begun)
    before = [
        {name: fact for name, fact in of.items() if name not in _RECOVERY_FACTS}
        for of in (old, facts)
    ]
    return bool(atomic.differences(old, facts)) and not atomic.differences(*before)


def _is_later(file: Path, reference: Path) -> bool:
    """Whether a file is there that was written after another one."""
    return file.exists() and file.stat().st_mtime_ns > reference.stat().st_mtime_ns


def _has_progress(work: Path) -> bool:
    return any(path.name != _BEGUN for path in work.iterdir())
