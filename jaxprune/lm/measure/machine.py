"""What a job ran on and what it cost: versions, devices, seconds, peak of memory."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

_PACKAGES = (
    *("jaxprune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    "tokenizers",
)


def versions(*others: str) -> dict[str, str]:
    """The versions of Python and of the installed packages that decide the numbers.

    Args:
      *others: packages that are named too, where they are installed.

    Returns:
      Name to version.
    """
    installed = {"python": platform.python_version()}
    for package in (*_PACKAGES, *others):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def device() -> str:
    """The devices in words, such as "1 x cpu (x86_64, 2 cores)"."""
    devices = jax.devices()
    text = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        # Those it may use, in a container say.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        text += f" ({platform.machine()}, {cores or os.cpu_count() or 1} cores)"
    return text


def peak_memory() -> int | None:
    """The greatest memory use so far, in bytes: a device's, or the process's on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes there, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


class Costs:
    """Seconds and the peak of memory of a job, phase by phase.

    A phase's peak is the greatest use from the start of the process to the phase's end.

    Example:
      >>> costs = Costs()
      >>> with costs.phase("prune"):
      ...     pass
      >>> [phase["name"] for phase in costs.facts()["phases"]]
      ['prune']
    """

    def __init__(self) -> None:
        self._phases: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what is done inside, under this name."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        peak = peak_memory()
        phase = {"name": name, "seconds": seconds, "peak_memory_bytes": peak}
        self._phases.append(phase)

    def facts(self) -> dict[str, Any]:
        """The phases, their seconds together, and the peak; JSON-able."""
        return {
            "phases": self._phases,
            "seconds": sum(phase["seconds"] for phase in self._phases),
            "peak_memory_bytes": peak_memory(),
        }
