"""Where a run that is not done keeps what it has, so that it resumes after a kill."""

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.cli import provenance
from jaxprune.lm.cli.job_options import JobOptions
from jaxprune.lm.texts import text_files

_BEGUN = "command.json"  # which job the progress is of


def refuse_done(job: JobOptions, arguments: list[str]) -> None:
    """Refuses to make again what this very command made."""
    if job.overwrite or not provenance.is_done(job.out, arguments):
        return
    with atomic.locked(job.work):
        if not _is_later(job.work / _BEGUN, job.out / rewrite.NAME):
            # What the run that made it left, killed at its very end.
            shutil.rmtree(job.work, ignore_errors=True)
    raise ValueError(
        f"'{job.out}' is whole, and this very command made it; give --overwrite to "
        "make it again, or another place"
    )


def check_room(job: JobOptions, source: CheckpointDir, copies: int) -> None:
    """Refuses, before a long job, a disk without room for the result and progress."""
    # `copies` of the model are written, the result included.
    out = job.out.resolve()
    before = [job.work, out.with_name(f".{out.name}.partial")]
    have = sum(map(atomic.bytes_in, before))
    atomic.check_room(job.out, source.size * copies + states(job, source) - have)


def states(job: JobOptions, source: CheckpointDir) -> int:
    """Bytes that the checkpoints of a recovery may take: two of them."""
    if job.recovery is None or job.recovery.trained == "norms":
        return 0
    # In float32 the weights; AdamW's moments are of small factors under "lora".
    each = 4 if job.recovery.trained == "lora" else 12
    return 2 * each * sum(math.prod(info.shape) for info in source.tensors.values())


def facts(
    job: JobOptions,
    source: CheckpointDir,
    calibration: list[text_files.AnyText],
    bos: str,
) -> dict[str, Any]:
    """What decides the result of any job, known without reading a weight."""
    read = [n for n in source.others if n.endswith((".json", ".jinja"))]
    files = {n: (source.path / n).stat() for n in (*source.metadata, *read)}
    return {
        "model": str(source.path),
        "files": {n: [s.st_size, s.st_mtime_ns] for n, s in files.items()},
        "ignored_config": list(job.ignore_config),
        "dtype": job.dtype,
        "calibration": [text.sha256 for text in calibration],
        "held_out": not job.evaluate and job.limit,
        "sequences": job.sequences,
        "length": job.length,
        "batch": job.batch,
        "seed": job.seed,
        "bos": bos,
        "recovery": job.recovery and [*map(str, job.recovery)],
    }


@contextlib.contextmanager
def held(work: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keeps the place of the progress for this run, and for this job."""
    begun = work / _BEGUN
    with atomic.locked(work):
        try:
            if not _has_progress(work):
                begun.unlink(missing_ok=True)
            atomic.begin_or_resume(begun, facts)
            yield
        except BaseException:
            if not _has_progress(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _is_later(file: Path, other: Path) -> bool:
    """Whether a file is there that was written after another one."""
    return file.exists() and file.stat().st_mtime_ns > other.stat().st_mtime_ns


def _has_progress(work: Path) -> bool:
    return any(path.name != _BEGUN for path in work.iterdir())
