"""`jaxprune prune`: a model with zeros, and what became of it."""

import dataclasses
from typing import Any

from jaxprune.arrays import processes
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.cli import (
    defaults,
    launch,
    plan,
    progress_dir,
    prune_options,
    prune_streaming,
    prune_with_calibration,
)
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.eval import by_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(prune_options.Job):
    """Prunes a model and writes it as a directory that every loader reads.

    All options and files are checked first. Then the dense model is measured, and a
    model that is worse than guessing is refused. The same command resumes a run that
    was killed; --plan says what would be done.
    """

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Prunes the model; the record."""
        with launch.joined(self, console, arguments):
            return self._run(console, launch.without_start(arguments))

    def _run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        processes.on_first(lambda: progress_dir.refuse_done(self, arguments))
        asked = defaults.method(self, console)
        job = asked.calibrated()
        meaning = processes.together(lambda: prune_options.check(job))
        if not job.streams or job.evaluate:
            job = defaults.lengths(job)
        if job.calibration != asked.calibration:
            console.note(
                "calibrated on what the model writes itself; a text of the kind that "
                "it is used on does better: --calibration FILE..."
            )
        if job.plan:
            return plan.prune(job, meaning, console)
        prune = prune_streaming.prune if job.streams else prune_with_calibration.prune
        record = prune(job, meaning, console, arguments)
        console.say(_summary(record))
        console.say(f"'{self.out}': the model, jaxprune.json, report.html")
        if left := open_directory(self.model).uncopied:
            console.note(f"not copied: {', '.join(left)}")
        return {**record, "out": str(self.out)}


def _summary(record: dict[str, Any]) -> str:
    """The results for people."""
    sizes = record["sizes"]
    lines = []
    if record.get("perplexity"):
        lines.append(by_stage(record))
    lines.append(
        f"{record['achieved']:.4%} of {sizes['size']:,} weights are zero "
        f"({record['method']}, {record['pattern']}); {sizes['dense_bytes']:,} bytes, "
        f"about {sizes['compact_bytes']:,} as a compact file; "
        f"{record['seconds']:.1f} s"
    )
    return "\n".join(lines)
