"""Several processes as one run: each is started with the same flags and its number."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.datasets import Corpus
from jaxprune.arrays.processes import on_first, together
from jaxprune.formats import atomic


def join(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes of a run; called before anything else of JAX.

    Args:
      coordinator: HOST:PORT where process 0 listens; "auto" where everything is known
        to the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU); None for one process.
      processes: how many there are; None where the cluster knows.
      process_id: which of them this is, from 0; None likewise.

    Raises:
      ValueError: a number is out of range or given without the coordinator.
      OSError: the cluster does not know what was left out, or the others did not come.
    """
    if coordinator is None:
        if processes is not None or process_id is not None:
            raise ValueError(
                "--processes and --process-id need --coordinator HOST:PORT, got none"
            )
        return
    known = coordinator != "auto"
    if known and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"--coordinator must be HOST:PORT or auto, got '{coordinator}'"
        )
    if processes is not None and processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        raise ValueError(
            f"--process-id must be from 0 to --processes - 1, got {process_id} of "
            f"{processes}"
        )
    try:
        jax.distributed.initialize(
            coordinator if known else None, processes, process_id
        )
    except (ValueError, RuntimeError) as error:
        raise OSError(
            f"the processes could not be joined ({error}); give --coordinator, "
            "--processes and --process-id"
        ) from error


def read_alike(read: Callable[[], Corpus]) -> Corpus:
    """Reads the text on every process, first on one, which prepares what is missing.

    Raises:
      ValueError: a process read another text than the first one.
    """
    if jax.process_count() == 1:
        return read()
    fingerprint = on_first(lambda: read().fingerprint)

    def same() -> Corpus:
        corpus = read()
        if corpus.fingerprint != fingerprint:
            raise ValueError(
                f"process {jax.process_index()} must read the text of process 0, got "
                "another; give all the same --text or --data-dir"
            )
        return corpus

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
