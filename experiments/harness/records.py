"""What a run leaves behind: metrics line by line, results at once, costs by phase.

A line of metrics.jsonl is there or is not, and so is a results file: it is written
beside and renamed. A full disk or a directory that cannot be written to is one error.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
      >>> from pathlib import Path
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> with MetricsLog(path, tensorboard=False) as log:
      ...     log.write({"step": 50, "loss": 2.5}, phase="train", seed=0)
      >>> path.read_text()
      '{"phase": "train", "seed": 0, "step": 50, "loss": 2.5}\n'
    """

    def __init__(self, path: str | os.PathLike[str], *, tensorboard: bool = True):
        """Opens or makes the file; writes events too if tensorboardX is installed.

        Raises:
          OSError: the directory cannot be written to.
        """
        self.path = Path(path).absolute()
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            self._drop_torn_line()
        self._events: Any = None
        if tensorboard and importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            with _explained(self.path):
                self._events = SummaryWriter(str(self.path.parent / "tensorboard"))

    def write(self, metrics: Mapping[str, Any], **labels: Any) -> None:
        """Appends a line, whole or not at all.

        Args:
          metrics: values measured at a step, and "step" itself; JSON-able, finite.
          **labels: names of the run's part, phase="train" say; they come first.

        Raises:
          ValueError: a value is NaN or infinite.
          OSError: the disk is full.
        """
        entry = {**labels, **metrics}
        line = (_encode(entry, self.path) + "\n").encode()
        size = self._file.seek(0, os.SEEK_END)
        with _explained(self.path):
            try:
                # Unbuffered, so a short write is seen here and not when the file is
                # closed.
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                with contextlib.suppress(OSError):
                    # What was written of the line goes, else the next one would be
                    # glued to it.
                    self._file.truncate(size)
                raise
        if self._events is not None:
            self._write_events(metrics, labels)

    def resume(self, step: int, **labels: Any) -> None:
        """Drops the lines past a step, which a resumed run is about to write again.

        Only lines with these labels are dropped; all of them where `step` is 0.

        Raises:
          OSError: the file could not be written; it is as it was.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _is_later(line, step, labels)]
        if len(kept) < len(lines):
            self._file.close()
            try:
                # The file is closed and opened anew: a rename leaves an open one on the
                # old content.
                _replace(self.path, b"".join(kept))
            finally:
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Closes the file and the events."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        # 0 where there is no line at all.
        end = content.rfind(b"\n") + 1
        if end < len(content):
            self._file.truncate(end)

    def _write_events(
        self, metrics: Mapping[str, Any], labels: Mapping[str, Any]
    ) -> None:
        place = "/".join(str(label) for label in labels.values())
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                tag = f"{place}/{name}" if place else name
                self._events.add_scalar(tag, value, metrics.get("step"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes a JSON file beside and renames it, so that it is whole or as it was.

    NumPy and JAX numbers and arrays are written as lists.

    Raises:
      ValueError: a value is NaN or infinite, named by its place.
      TypeError: a value is no JSON.
      OSError: the directory cannot be written to or the disk is full.
    """
    path = Path(path).absolute()
    text = _encode(content, path, indent=1)
    _replace(path, (text + "\n").encode())


@dataclasses.dataclass
class Phase:
    """What a phase of a run cost.

    Attributes:
      name: what was done, such as "train".
      seed: seed that it belongs to, or None.
      tokens: tokens processed, set by the caller; None where it has no meaning.
      seconds: wall time.
      peak_memory_bytes: the greatest use so far: of a device on GPU and TPU, of the
        process on CPU; None where the platform does not say.
      energy_kwh: energy of CPU, memory and GPU; None where not asked for.
      co2_kg: kilograms of CO2 equivalent, by the country's mean; likewise.
      share: share of the work that was done in this start, 1 unless a training went
        on from a checkpoint; set by the caller.
    """

    name: str
    seed: int | None = None
    tokens: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    energy_kwh: float | None = None
    co2_kg: float | None = None
    share: float = 1.0

    def record(self) -> dict[str, Any]:
        """The phase as results.json holds it, with tokens per second for tokens."""
        record = dataclasses.asdict(self)
        tokens = record.pop("tokens")
        rate = tokens / self.seconds if tokens and self.seconds else None
        return {**record, "tokens_per_second": rate}


@contextlib.contextmanager
def measure(
    name: str, *, seed: int | None = None, country: str | None = None
) -> Iterator[Phase]:
    """Measures the seconds, memory and, if asked, the energy of what is done inside.

    Args:
      name: name of the phase, "train" say.
      seed: seed that the phase belongs to, or None.
      country: three-letter ISO code whose electricity counts, to measure energy with
        codecarbon, offline; None for no energy.

    Yields:
      The phase; its costs are filled in at the end, failed or not.

    Example:
      >>> with measure("train", seed=0) as phase:
      ...     phase.tokens = 1000
      >>> phase.record()["tokens_per_second"] > 0
      True
    """
    phase = Phase(name, seed)
    tracker = None if country is None else _start_tracker(country)
    start = time.perf_counter()
    try:
        yield phase
    finally:
        phase.seconds = time.perf_counter() - start
        phase.peak_memory_bytes = peak_memory()
        if tracker is not None:
            phase.co2_kg = tracker.stop()
            phase.energy_kwh = float(tracker.final_emissions_data.energy_consumed)


def check_country(country: str) -> None:
    """Refuses a country whose electricity codecarbon does not know.

    Raises:
      ValueError: codecarbon would take the world's mean for it, without a word.
      ModuleNotFoundError: codecarbon is not installed.
    """
    if importlib.util.find_spec("codecarbon") is None:
        raise ModuleNotFoundError(
            "energy is measured with the package codecarbon, which is not installed; "
            "pip install '.[energy]', or leave --energy out"
        )
    # Its own log level takes effect only after it has said the first things.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    from codecarbon.input import DataSource

    if country.upper() not in DataSource().get_global_energy_mix_data():
        raise ValueError(
            f"energy needs a country's code of three letters, such as FRA, got "
            f"{country!r}"
        )


def _start_tracker(country: str) -> Any:
    check_country(country)
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        # No output methods: codecarbon would write emissions.csv where the run was
        # started.
        country_iso_code=country,
        output_methods=[],
        log_level="critical",
    )
    tracker.start()
    return tracker


def _is_later(line: bytes, step: int, labels: Mapping[str, Any]) -> bool:
    entry = json.loads(line)
    matches = all(entry.get(name) == value for name, value in labels.items())
    # A run that begins anew reports step 0 again, so that line goes as well.
    return matches and (step == 0 or entry.get("step", 0) > step)


def _encode(content: Any, path: Path, indent: int | None = None) -> str:
    try:
        # NaN is no JSON: strict readers of results.json would stop at it.
        return json.dumps(content, default=_plain, allow_nan=False, indent=indent)
    except ValueError as error:
        place = _first_not_finite(content, "")
        if place is None:
            raise
        raise ValueError(
            f"'{path}' must hold finite numbers, got NaN or infinity at '{place}'; "
            f"write None where there is no number"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"JSON holds no {type(value).__name__}, got {value!r}")


def _first_not_finite(content: Any, place: str) -> str | None:
    if isinstance(content, np.ndarray | np.generic | jax.Array):
        content = np.asarray(content).tolist()
    if isinstance(content, float):
        return None if math.isfinite(content) else place
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    places = (_first_not_finite(v, f"{place}/{k}".lstrip("/")) for k, v in items)
    return next((name for name in places if name is not None), None)


def _replace(path: Path, content: bytes) -> None:
    with _explained(path):
        atomic.replace(path, content)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an operating system's error into a sentence with the way out."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno,
            f"'{path}' could not be written ({error.strerror}); free space there or "
            f"choose another directory",
        ) from error
