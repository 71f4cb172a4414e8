"""What is written down of a job, and read again by its page: jaxprune.json."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.compact_sizes import packed_bytes
from jaxprune.lm.checkpoints.levels import Grid
from jaxprune.lm.measure import machine
from jaxprune.lm.steps.settings import Pruning

PAGE = "report.html"


def weight_sizes(
    source: CheckpointDir,
    counts: Mapping[str, tuple[int, int]],
    pruning: Pruning | None = None,
) -> dict[str, int]:
    """Bytes of the weights as they are, and in a compact file.

    Args:
      source: directory of the dense model.
      counts: tensor name to its zeros and its size, of those that were pruned; the
        others count as dense.
      pruning: options with the bits and the group of the weights that stay.

    Returns:
      JSON-able sizes.
    """
    zeros = {name: count for name, (count, _) in counts.items()}
    grids: dict[str, Grid] = {}  # only what was pruned was quantized
    if pruning is not None and pruning.bits is not None:
        grids = dict.fromkeys(zeros, Grid(pruning.bits, pruning.group))
    return {
        "dense_bytes": source.size,
        "compact_bytes": packed_bytes(source, zeros, grids),
        "zeros": sum(zeros.values()),
        "size": sum(size for _, size in counts.values()),
        # Of the whole model: embeddings, heads and norms are not pruned.
        "parameters": sum(math.prod(info.shape) for info in source.tensors.values()),
    }


def environment(command: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """The command, the versions (of more packages too) and the devices; JSON-able."""
    return {
        "command": command,
        "versions": machine.versions(*packages),
        "device": machine.device(),
    }


def page_file(record: Mapping[str, Any]) -> dict[str, bytes]:
    """The page of a whole record, by its file's name."""
    # --help does not wait for matplotlib.
    from jaxprune.lm.report.any_page import page_of

    return {PAGE: page_of(record).encode(errors="replace")}


def is_done(directory: Path, command: str) -> bool:
    """Whether a directory is what this very command made; it may be killed since."""
    if not (directory / rewrite.NAME).is_file():
        return False
    try:
        record = rewrite.read_provenance(directory)
    except ValueError:
        return False
    return record.get("command") == command
