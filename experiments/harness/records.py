"""What a run leaves behind: metrics line by line, and results by stage.

A results file is there whole or not at all: it is written beside and renamed.
"""

import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.processes import is_first, on_first
from jaxprune.files import atomic
from jaxprune.lm.measure.machine import device as device
from jaxprune.lm.measure.machine import peak_memory
from jaxprune.lm.measure.machine import versions as versions


class MetricsLog:
    r"""Metrics of a run, one JSON object a line, and as TensorBoard events.

    Opening a file of an earlier, killed run drops a torn last line. Events go to the
    directory "tensorboard" beside the file, if the package tensorboardX is installed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> MetricsLog(path).write({"step": 50, "loss": 2.5}, phase="train", seed=0)
      >>> path.read_text()
      '{"phase": "train", "seed": 0, "step": 50, "loss": 2.5}\n'
    """

    def __init__(self, path: Path):
        """Opens the file, or makes it at the first line."""
        self.path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            atomic.replace(path, b"".join(whole))
        self._events: Any = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, metrics: Mapping[str, Any], **labels: Any) -> None:
        """Appends a line.

        Args:
          metrics: values measured at a step, and "step" itself; JSON-able, finite.
          **labels: names of the run's part, phase="train" say; they come first.
        """
        line = json.dumps({**labels, **metrics}, allow_nan=False) + "\n"
        with self.path.open("a") as file:
            file.write(line)
        if self._events is not None:
            place = "/".join(map(str, labels.values()))
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(f"{place}/{name}", value, metrics["step"])

    def resume(self, step: int, **labels: Any) -> None:
        """Drops the lines with these labels past a step; all of them at step 0.

        A resumed run is about to write them again.
        """

        def stays(entry: Mapping[str, Any]) -> bool:
            matches = all(entry.get(name) == value for name, value in labels.items())
            return not matches or 0 < step >= entry["step"]

        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if stays(json.loads(line)))
            atomic.replace(self.path, kept.encode())


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """The content of a JSON file; computed by all and written if it is missing."""
    if not on_first(path.exists):
        content = compute()
        on_first(lambda: atomic.replace_json(path, content))
    # Read back even when just computed: a resumed run gets the very same values.
    return on_first(lambda: json.loads(path.read_text()))


class Stages:
    """The stages of one seed, in the order in which they are asked for.

    Attributes:
      directory: directory of the seed; a stage is a small file in it.
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

        "tokens" in what `compute` returns goes to the costs of the stage.
        """
        self._progress.note(f"seed {self._seed} {stage.replace('/', ' ')}")

        def measured() -> dict[str, Any]:
            # "prune/preconditioned_magnitude-global-0.5" is a "prune"
            phase: dict[str, Any] = {"name": stage.split("/")[0], "seed": self._seed}
            start = time.perf_counter()
            with _energy(self._country) as energy:
                content = compute()
            seconds = time.perf_counter() - start
            tokens = content.pop("tokens", None)
            phase |= {"seconds": seconds, "peak_memory_bytes": peak_memory(), **energy}
            phase["tokens_per_second"] = tokens / seconds if tokens else None
            return {"content": content, "phase": phase}

        stored = once(self.directory / f"{stage}.json", measured)
        self.phases.append(stored["phase"])
        self._progress.update()
        return stored["content"]


@contextlib.contextmanager
def _energy(country: str | None) -> Iterator[dict[str, float | None]]:
    """Kilowatt-hours and kilograms of CO2 of what is done inside, by codecarbon."""
    measured: dict[str, float | None] = {"energy_kwh": None, "co2_kg": None}
    # One meter a machine: two would count the same watts twice.
    if country is None or not is_first():
        yield measured
        return
    from codecarbon import OfflineEmissionsTracker

    # It speaks before it has read its own log level.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        country_iso_code=country,
        # It would write emissions.csv where the run was started.
        output_methods=[],
        log_level="critical",
    )
    tracker.start()
    try:
        yield measured
    finally:
        measured["co2_kg"] = tracker.stop()
        measured["energy_kwh"] = float(tracker.final_emissions_data.energy_consumed)


def summed(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One phase a name: costs added up, the peak of memory, the mean rate."""
    merged = []
    for name in dict.fromkeys(phase["name"] for phase in phases):
        group = [phase for phase in phases if phase["name"] == name]
        # Rates do not add: tokens and seconds do, and their ratio is the mean rate.
        seconds = sum(phase["seconds"] for phase in group)
        tokens = sum((p["tokens_per_second"] or 0) * p["seconds"] for p in group)
        total = {**group[0], "seconds": seconds}
        total["tokens_per_second"] = tokens / seconds or None
        for field, reduce in (
            ("energy_kwh", np.sum),
            ("co2_kg", np.sum),
            ("peak_memory_bytes", np.max),
        ):
            values = [phase[field] for phase in group if phase[field] is not None]
            total[field] = reduce(values).item() if values else None
        merged.append(total)
    return merged
