"""Several processes as one run: each is started with the same flags and its number."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.datasets import Corpus
from jaxprune.arrays.processes import join, on_first, together
from jaxprune.files import atomic

__all__ = ["check_alike", "join", "read_alike"]


def read_alike(read: Callable[[], Corpus]) -> Corpus:
    """Reads the text on every process, first on one, which prepares what is missing.

    Raises:
      ValueError: a process read another text than the first one.
    """
    if jax.process_count() == 1:
        return read()
    # The first one prepares the data set alone; the others then find it prepared.
    fingerprint = on_first(lambda: read().fingerprint)

    def same() -> Corpus:
        corpus = read()
        if corpus.fingerprint != fingerprint:
            raise ValueError(
                f"process {jax.process_index()} must read the text of process 0, got "
                "another; give all the same --text or --data-dir"
            )
        return corpus

    # A refusal on one process ends all of them, else the others wait for it.
    return together(same)


def check_alike(settings: Mapping[str, Any]) -> None:
    """Refuses processes that were started with different flags.

    Raises:
      ValueError: the settings differ; the sentence names the fields.
    """
    first = on_first(lambda: dict(settings))

    def same() -> None:
        if different := atomic.differences(first, settings):
            raise ValueError(
                f"process {jax.process_index()} must be started as process 0, but "
                f"{'; '.join(different)}; give all processes the same flags"
            )

    together(same)
