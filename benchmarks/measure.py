"""How every benchmark measures: candidates in turn, medians with their spread.

Times are seconds, memory is bytes. The candidates of a comparison run alternately in
one process, so that whatever else the machine does falls on all of them alike.
"""

import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic
from jaxprune.lm.measure import machine

Clock = Literal["wall", "cpu"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_T = TypeVar("_T")


def median_and_spread(samples: Sequence[float]) -> dict[str, float | int]:
    """The median of repeated measurements and how far they spread.

    Args:
      samples: measurements, at least one.

    Returns:
      `median`, `min`, `max`, the quartiles `q1` and `q3`, and `repeats`.

    Example:
      >>> from benchmarks import measure
      >>> measure.median_and_spread([3.0, 1.0, 2.0])["median"]
      2.0
    """
    # Quantiles: one interrupted timing moves a mean, and no median.
    lowest, q1, median, q3, highest = np.quantile(samples, [0, 0.25, 0.5, 0.75, 1])
    return {
        "median": float(median),
        "min": float(lowest),
        "q1": float(q1),
        "q3": float(q3),
        "max": float(highest),
        "repeats": len(samples),
    }


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """The mean and, of several values, their sample standard deviation.

    Args:
      values: numbers, at least one.
      form: format of a number; a sign in it is for the mean alone.

    Returns:
      Text for a table.

    Example:
      >>> from benchmarks import measure
      >>> measure.mean_and_spread([1.0, 2.0], "+.1f")
      '+1.5 ± 0.7'
    """
    middle = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return middle
    return f"{middle} ± {statistics.stdev(values):{form.lstrip('+')}}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Args:
      rows: texts of the cells, the head first.

    Returns:
      Markdown, without an end of line after the last row.

    Example:
      >>> from benchmarks import measure
      >>> print(measure.markdown([["text", "perplexity"], ["news", "7.1"]]))
      | text | perplexity |
      | --- | --- |
      | news | 7.1 |
    """
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(
    call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of one call, until its results are there.

    Args:
      call: function of no arguments; arrays in its result are waited for.
      clock: function that tells the time: wall time or, with `time.process_time`, what
        all threads of this process have worked, which depends less on other programs.

    Returns:
      Seconds.
    """
    start = clock()
    # A call returns when it is dispatched; the result may be far from ready.
    jax.block_until_ready(call())
    return clock() - start


def progress(items: Collection[_T], label: str, unit: str = "step") -> Iterator[_T]:
    """The items one after the other, with a bar or now and then a line on stderr.

    Args:
      items: collection to go through.
      label: verb of what is done with them, "timing" say.
      unit: noun of an item, in the singular.

    Yields:
      Each item; it counts as done when the next one is asked for.
    """
    with Progress(len(items), label, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times the candidates alternately: a b c, a b c, ...

    Args:
      functions: name to a function of no arguments.
      repeats: number of measured calls of each.
      warmup: number of calls of each before, which compile.
      clock: function that tells the time; see `seconds`.

    Returns:
      Name to seconds of each measured call.
    """
    rounds = progress(range(warmup + repeats), "timing", "round")
    calls = [
        {name: seconds(function, clock) for name, function in functions.items()}
        for _ in rounds
    ]
    return {
        name: [round_times[name] for round_times in calls[warmup:]]
        for name in functions
    }


def peak_memory(function: Callable[[], Any]) -> dict[str, int]:
    """How much more memory the process held at the worst moment of one call.

    The kernel's own high-water mark on Linux; elsewhere, and where it cannot be reset,
    the largest of many readings a second. It is of host memory: on an accelerator read
    `compiled.memory_analysis()` or `device.memory_stats()`.

    Args:
      function: function of no arguments; call it once before, or compilation is
        measured too.

    Returns:
      `extra_bytes`, the peak over what was held before; `kept_bytes`, what was still
      held at the end, with the result alive.

    Raises:
      OSError: the system has no /proc.
    """
    # Else cycles that hold earlier arrays could be freed inside, and hide a peak.
    gc.collect()
    before = _resident("VmRSS")
    with _Watch() as watch:
        # Held until the second reading: what is kept includes the result.
        result = jax.block_until_ready(function())
    kept = _resident("VmRSS") - before
    del result
    # The mark may lie below what was resident when other pages are returned meanwhile.
    return {"extra_bytes": max(watch.peak - before, 0), "kept_bytes": kept}


def environment() -> dict[str, Any]:
    """The device and the versions that decide the numbers.

    Returns:
      `device`, `devices` (how many), `cpu` (cores and model) and `versions` by name.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu(),
        "versions": machine.versions("torch"),
    }


def begin(place: Path, config: Any, *decisive: str) -> None:
    """Notes which settings the results of a place are of.

    Args:
      place: a folder, or a .csv.
      config: settings of the benchmark.
      *decisive: names of those that decide numbers and are in no name of a result.

    Raises:
      SystemExit: the results there are of others.
    """
    folder = place.parent if place.suffix == ".csv" else place
    folder.mkdir(parents=True, exist_ok=True)
    path = "settings.json" if folder == place else f"{place.stem}.settings.json"
    settings = {name: getattr(config, name) for name in decisive}
    try:
        atomic.begin_or_resume(folder / path, settings)
    except ValueError as problem:
        raise SystemExit(str(problem)) from problem


def report(name: str, **fields: Any) -> None:
    """Prints the one JSON line of a benchmark.

    Args:
      name: name of the benchmark, which is its claim.
      **fields: results, JSON-able; the environment is added.
    """
    print(json.dumps({"benchmark": name, **fields, **environment()}))


class _Watch:
    """The largest resident size while the block runs."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "_Watch":
        try:
            _CLEAR.write_text("5")  # resets VmHWM
            self._exact = True
        except OSError:
            self._exact = False
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._exact:
            self.peak = _resident("VmHWM")
            return
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._done.wait(0.0005):  # seconds
            self.peak = max(self.peak, _resident("VmRSS"))


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # "VmHWM:  123456 kB"
    raise OSError(f"{_STATUS} must have the line {field}; run on Linux")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text().splitlines()
    models = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()
