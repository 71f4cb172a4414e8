"""`jaxprune prune`: a model with zeros, and what became of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.cli import launch, summary
from jaxprune.lm.cli.options import Options
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.prune import prepare_prune
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.transformation import run_job
from jaxprune.lm.torch_models import routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(PruneJob, Options):
    """Prunes a model and writes it as a directory that every loader reads.

    All options and files are checked first. Then the dense model is measured, and a
    model that is worse than guessing is refused. The same command resumes a run that
    was killed; --plan says what would be done.
    """

    EXAMPLE: ClassVar = (
        "jaxprune prune MODEL OUT --sparsity 0.5 --calibration prose.txt code.jsonl"
    )

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Prunes the model; the record."""
        with launch.join_processes(self.devices.distributed, console, words):
            command = summary.command_line(words)
            if routing.prunes_through_torch(self):
                routing.check_installed(open_directory(self.model).config)
                from jaxprune.lm.torch_models.prune import prepare_torch_prune

                prepare = prepare_torch_prune
            else:
                prepare = prepare_prune
            record = run_job(prepare, self, console, command, _page)
            lines = [] if self.plan else summary.prune_lines(record)
            return summary.say_done(self, record, lines, console)


def _page(record: Mapping[str, Any]) -> str:
    from jaxprune.lm.report import pruned_model  # --help does not wait for it

    return pruned_model.document(record)
