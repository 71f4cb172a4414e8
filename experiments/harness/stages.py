"""A stage's result is a small file: what is there is read, what is not is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.harness.records import measure, write_json
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.processes import is_first, on_first


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """The content of a JSON file; computed by all and written if it is missing."""
    if not on_first(path.exists):
        content = compute()
        on_first(lambda: write_json(path, content))
    # Read back even when just computed: a resumed run gets the very same values.
    return on_first(lambda: json.loads(path.read_text()))


class Stages:
    """The stages of one seed, in the order in which they are asked for.

    Attributes:
      directory: directory of the seed.
      phases: what each stage cost, as results.json holds it.
    """

    def __init__(
        self, directory: Path, seed: int, country: str | None, progress: Progress
    ) -> None:
        """Computes nothing; `progress` counts the stages of the whole run."""
        self.directory, self._seed = directory, seed
        self._country, self._progress = country, progress
        self.phases: list[dict[str, Any]] = []

    def once(self, stage: str, compute: Callable[[], dict[str, Any]]) -> Any:
        """The result of a stage, of this start or of an earlier one, as JSON holds it.

        "tokens" and "share" in what `compute` returns go to the costs of the stage.
        """
        self._progress.note(f"seed {self._seed} {stage.replace('/', ' ')}")
        # One meter a machine: two would count the same watts twice.
        country = self._country if is_first() else None

        def measured() -> dict[str, Any]:
            name = stage.split("/")[
                0
            ]  # "prune/preconditioned_magnitude-global-0.5" is a "prune"
            with measure(name, seed=self._seed, country=country) as phase:
                content = compute()
                phase.tokens = content.pop("tokens", None)
                phase.share = content.pop("share", 1.0)
            return {"content": content, "phase": phase.record()}

        stored = once(self.directory / f"{stage}.json", measured)
        self.phases.append(stored["phase"])
        self._progress.update()
        return stored["content"]
