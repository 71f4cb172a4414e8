"""What is written down of a pruning, and read again by its page: jaxprune.json."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.compact_sizes import packed_bytes
from jaxprune.lm.checkpoints.levels import Grid
from jaxprune.lm.measure import machine
from jaxprune.posttraining.solvers.quantization import Quantization

PAGE = "report.html"


def sizes(
    source: CheckpointDir,
    counts: Mapping[str, tuple[int, int]],
    rounding: Quantization | None = None,
) -> dict[str, int]:
    """Bytes of the weights as they are, and in a compact file."""
    # `counts` are zeros and size of each pruned tensor; others count as dense.
    zeros = {name: count for name, (count, _) in counts.items()}
    grid = rounding and Grid(rounding.bits, rounding.group)
    rounded = dict.fromkeys(zeros, grid) if grid else {}
    return {
        "dense_bytes": source.size,
        "compact_bytes": packed_bytes(source, zeros, rounded),
        "zeros": sum(zeros.values()),
        "size": sum(size for _, size in counts.values()),
    }


def making(arguments: Iterable[str]) -> dict[str, Any]:
    """The command, the versions and the devices; JSON-able."""
    return {
        "command": _command(arguments),
        "versions": machine.versions(),
        "device": machine.device(),
    }


def _command(arguments: Iterable[str]) -> str:
    return shlex.join(["jaxprune", *arguments])


def with_page(record: Mapping[str, Any]) -> dict[str, bytes]:
    """The page of a whole record, by its name."""
    from jaxprune.lm.report import pruned_model

    return {PAGE: pruned_model.document(record).encode(errors="replace")}


def is_done(directory: Path, arguments: Iterable[str]) -> bool:
    """Whether a directory is what this very command made; it may be killed since."""
    if not (directory / rewrite.NAME).is_file():
        return False
    try:
        record = rewrite.read_provenance(directory)
    except ValueError:
        return False
    return record.get("command") == _command(arguments)
