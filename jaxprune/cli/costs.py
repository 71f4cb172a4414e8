"""Seconds and the peak of memory, phase by phase."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jaxprune.cli import machine


class Costs:
    """What a command's phases cost."""

    def __init__(self) -> None:
        self._phases: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what is done inside.

        Args:
          name: what that is.

        Yields:
          Nothing.
        """
        start = time.perf_counter()
        yield
        self._phases.append(
            {
                "name": name,
                "seconds": time.perf_counter() - start,
                "peak_memory_bytes": machine.peak_memory(),
            }
        )

    def facts(self) -> dict[str, Any]:
        """The phases, their seconds together, and the peak; JSON-able."""
        return {
            "phases": self._phases,
            "seconds": sum(phase["seconds"] for phase in self._phases),
            "peak_memory_bytes": machine.peak_memory(),
        }
