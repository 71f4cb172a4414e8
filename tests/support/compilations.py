"""Counts what XLA compiles, which is more than what JAX traces."""

import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compiled() -> Iterator[list[float]]:
    """A list that gets the seconds of each compilation inside the context."""
    durations: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == _EVENT:
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
