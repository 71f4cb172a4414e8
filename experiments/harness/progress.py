"""What a training loop reports: the mean loss and the rate of a window."""

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
    """Losses on their way from the device; a context that shows how far the run is.

    Attributes:
      label: names the run on the bar and in errors.
      write: gets each window's metrics.
    """

    def __init__(
        self,
        label: str,
        write: Callable[[dict[str, Any]], None] | None,
        *,
        start: int,
        steps: int,
    ) -> None:
        """Shows the bar; `start` steps of `steps` were done before."""
        self.label, self.write = label, write or (lambda metrics: None)
        self._bar = console_progress.Progress(
            steps, label, done=start, shown=processes.is_first()
        )
        self._losses: list[jax.Array] = []
        self._ahead: collections.deque[Any] = collections.deque()
        self._tokens = 0
        self._clock: float | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, loss: jax.Array, tokens: int) -> None:
        """Takes the loss of a step, a device scalar, and the number of its tokens."""
        self._losses.append(loss)
        self._ahead.append(loss)
        self._show_done(_MOST_AHEAD)
        if self._clock is None:
            # The first step compiles: the rate counts from its end.
            self._show_done(0)
            self.restart_clock()
        else:
            self._tokens += tokens

    def _show_done(self, ahead: int) -> None:
        """Counts the steps that are done, and waits while more than `ahead` are not."""
        while len(self._ahead) > ahead or (self._ahead and self._ahead[0].is_ready()):
            jax.block_until_ready(self._ahead.popleft())
            self._bar.update()

    def restart_clock(self) -> None:
        """Counts time and tokens anew, at a moment when no step is running."""
        self._clock, self._tokens = time.perf_counter(), 0

    def report(self, step: int, more: Callable[[], Mapping[str, Any]] | None) -> None:
        """Reports the steps since the last report, with what `more` returns."""
        self._show_done(0)
        values = np.asarray(jax.device_get(self._losses), np.float64)
        self._losses = []
        if not np.isfinite(values).all():
            wrong = int(np.argmin(np.isfinite(values)))
            first = step - len(values) + 1 + wrong
            raise FloatingPointError(
                f"{self.label}: the loss must be finite, got {values[wrong]} at step "
                f"{first}; lower the learning rate"
            )
        rate = self._tokens / (time.perf_counter() - (self._clock or 0.0)) or None
        loss = float(values.mean())
        self._bar.note(f"loss {loss:.3f}")
        metrics = {"step": step, "loss": loss, "tokens_per_second": rate}
        self.write({**metrics, **(more() if more else {})})
        self.restart_clock()
