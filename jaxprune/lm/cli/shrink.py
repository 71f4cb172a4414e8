"""`jaxprune shrink`: a smaller model, as a directory that every loader reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.cli import summary
from jaxprune.lm.cli.options import Options
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.shrink import prepare_shrink
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.jobs.transformation import run_job
from jaxprune.lm.torch_models import routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(ShrinkJob, Options):
    """Removes whole layers, experts, heads and neurons; leaves a smaller model.

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
        if routing.is_foreign_directory(self.model):
            routing.check_installed(open_directory(self.model).config)
            from jaxprune.lm.torch_models.shrink import prepare_torch_shrink

            prepare = prepare_torch_shrink
        else:
            prepare = prepare_shrink
        command = summary.command_line(words)
        record = run_job(prepare, self, console, command, _page)
        lines = [] if self.plan else summary.shrink_lines(record)
        return summary.say_done(self, record, lines, console)


def _page(record: Mapping[str, Any]) -> str:
    from jaxprune.lm.report import shrunk_model  # --help does not wait for it

    return shrunk_model.document(record)
