"""What is written down of a pruning, and read again by its page: jaxprune.json."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxprune.evaluation import machine
from jaxprune.formats import atomic, rewrite
from jaxprune.formats.checkpoint_dir import CheckpointDir
from jaxprune.formats.compact import packed_bytes
from jaxprune.report import pruned_model

PAGE = "report.html"


def sizes(
    source: CheckpointDir, counts: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Bytes of the weights as they are, and in a compact file."""
    # `counts` are zeros and size of each pruned tensor; others count as dense.
    zeros = {name: count for name, (count, _) in counts.items()}
    return {
        "dense_bytes": source.size,
        "compact_bytes": packed_bytes(source, zeros),
        "zeros": sum(zeros.values()),
        "size": sum(size for _, size in counts.values()),
    }


def making(arguments: Iterable[str]) -> dict[str, Any]:
    """The command, the versions and the devices; JSON-able."""
    return {
        "command": shlex.join(["jaxprune", *arguments]),
        "versions": machine.versions(),
        "device": machine.device(),
    }


def complete(directory: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a written directory's record what came later, and writes its page."""
    # Entries of `more` take the place of those of the same name.
    record = rewrite.read_provenance(directory) | dict(more)
    atomic.replace_json(directory / rewrite.NAME, record)
    atomic.replace(directory / PAGE, pruned_model.document(record).encode())
    return record
