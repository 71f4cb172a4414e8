"""Losses on their way from the device: a window is fetched when the next is full.

So the device never waits for the host, and is never two windows behind it. The bar
counts the steps that the device has done.
"""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import console_progress, processes

# Steps that wait for the device at once: enough that it never idles, and few enough
# that a run with steps of many seconds says where it is.
_MOST_AHEAD = 8


class Progress:
    """What a training loop reports while it runs; a context that shows how far it is.

    Attributes:
      label: names the run on the bar and in errors.
    """

    def __init__(
        self,
        label: str,
        write: Callable[[dict[str, Any]], None] | None,
        *,
        start: int,
        steps: int,
    ) -> None:
        """Prepares; nothing is shown before the context is entered.

        `write` gets each window's metrics; `start` steps of `steps` were done before.
        """
        self.label = label
        self.write = write or (lambda metrics: None)
        self._start, self._steps = start, steps
        self._bar: Any = None
        self._open: list[jax.Array] = []
        self._closed: list[tuple[int, list[jax.Array]]] = []
        self._ahead: collections.deque[Any] = collections.deque()
        self._tokens_per_step = 0
        self._timed = 0  # steps since the clock started
        self._clock: float | None = None

    def __enter__(self) -> "Progress":
        self._bar = console_progress.Progress(
            self._steps, self.label, done=self._start, shown=processes.is_first()
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, loss: jax.Array, tokens: int) -> None:
        """Takes the loss of a step, a device scalar, and the number of its tokens."""
        self._open.append(loss)
        self._ahead.append(loss)
        self._tokens_per_step = tokens
        # The first step compiles; the rate counts from its end.
        self._show_done(0 if self._clock is None else _MOST_AHEAD)
        if self._clock is None:
            self.restart_clock()
            # The step that compiled is in no rate: it is taken off when its window is
            # fetched.
            self._timed = -1

    def _show_done(self, ahead: int) -> None:
        """Counts the steps that are done, and waits while more than `ahead` are not."""
        while len(self._ahead) > ahead or (self._ahead and self._ahead[0].is_ready()):
            jax.block_until_ready(self._ahead.popleft())
            self._bar.update()

    def restart_clock(self) -> None:
        """Counts time and tokens anew, at a moment when no step is running."""
        self._clock, self._timed = time.perf_counter(), 0

    def close(self, step: int) -> None:
        """Ends a window after this step and reports the one before."""
        self._closed.append((step, self._open))
        self._open = []
        while len(self._closed) > 1:
            self.write(self._fetch())

    def finish(self, more: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """Reports the window that was closed last, with what `more` returns."""
        self._show_done(0)
        metrics = self._fetch()
        self.write({**metrics, **(more() if more else {})})
        self.restart_clock()

    def _fetch(self) -> dict[str, Any]:
        """Waits for the oldest window and gives its metrics."""
        step, losses = self._closed.pop(0)
        values = np.asarray(jax.device_get(losses), np.float64)
        seconds = time.perf_counter() - (self._clock or 0.0)
        if not np.isfinite(values).all():
            wrong = int(np.argmin(np.isfinite(values)))
            first = step - len(values) + 1 + wrong
            raise FloatingPointError(
                f"{self.label}: the loss must be finite, got {values[wrong]} at step "
                f"{first}; lower the learning rate"
            )
        self._timed += len(values)
        timed_steps = self._timed
        # The window behind this one may be done too; its steps fill the same seconds.
        newest: Any = self._closed[0][1][-1] if self._closed else None
        if newest is not None and newest.is_ready():
            timed_steps += len(self._closed[0][1])
        loss = float(values.mean())
        rate = (
            timed_steps * self._tokens_per_step / seconds if timed_steps > 0 else None
        )
        self._bar.note(f"loss {loss:.3f}")
        return {"step": step, "loss": loss, "tokens_per_second": rate}
