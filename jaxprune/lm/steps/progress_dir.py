"""Where a run that is not done keeps what it has, so that it resumes after a kill."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.measure import machine
from jaxprune.lm.steps import provenance
from jaxprune.lm.steps.settings import Job
from jaxprune.lm.steps.step_texts import StepTexts

_BEGUN = "command.json"  # which job the progress is of


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


def check_room(job: Job, needed: int) -> None:
    """Refuses, before a long step, a disk without room for the result and progress.

    Args:
      job: place of the result and of the progress.
      needed: bytes that both take.

    Raises:
      OSError: the disk has less room.
    """
    out = job.out.resolve()
    # What an earlier run left there is written again, or replaced.
    before = [job.work, out.with_name(f".{out.name}.partial")]
    atomic.check_room(job.out, needed - sum(map(atomic.bytes_in, before)))


def job_facts(job: Job, source: CheckpointDir, texts: StepTexts) -> dict[str, Any]:
    """What decides the result of any step, known without reading a weight.

    Args:
      job: options of the step.
      source: directory of the model before, whose files are told by size and time.
      texts: texts that the step reads.

    Returns:
      A JSON-able record; a run goes on only with the progress of an equal one.
    """
    return {
        # Half by one method and half by its next release would be neither's.
        "jaxprune": machine.versions().get("jaxprune"),
        "model": str(source.path),
        "files": file_times(source),
        "ignored_config": list(job.loading.ignore_config),
        "dtype": job.loading.dtype,
        "calibration": [text.sha256 for text in texts.calibration],
        "held_out": not job.calibration.evaluate,
        "sequences": job.calibration.sequences,
        "length": job.calibration.length,
        "batch": job.calibration.batch,
        "seed": job.calibration.seed,
        "self": job.calibration.self_sequences,
        "bos": texts.begins.why,
    }


def file_times(source: CheckpointDir) -> dict[str, list[int]]:
    """Sizes and times of the files that decide what a model computes and writes.

    To hash weights would take as long as to read them.

    Args:
      source: directory of the model.

    Returns:
      File name to size and time of the last change; JSON-able.
    """
    configs = [n for n in source.others if n.endswith((".json", ".jinja"))]
    stats = {n: (source.path / n).stat() for n in sorted([*source.metadata, *configs])}
    return {n: [stat.st_size, stat.st_mtime_ns] for n, stat in stats.items()}


@contextlib.contextmanager
def hold_progress(work: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keeps the place of the progress for this run, and for this job.

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
            atomic.begin_or_resume(begun, facts)
            yield
        except BaseException:
            if not _has_progress(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _is_later(file: Path, reference: Path) -> bool:
    """Whether a file is there that was written after another one."""
    return file.exists() and file.stat().st_mtime_ns > reference.stat().st_mtime_ns


def _has_progress(work: Path) -> bool:
    return any(path.name != _BEGUN for path in work.iterdir())
