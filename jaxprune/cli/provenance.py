"""What is written down of a pruning, and read again by its page: jaxprune.json."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.cli import machine
from jaxprune.evaluation.texts import Text
from jaxprune.formats import atomic, rewrite
from jaxprune.formats.checkpoint_dir import CheckpointDir
from jaxprune.formats.compact import stored_bytes
from jaxprune.report import pruned_model

PAGE = "report.html"


def calibration(
    texts: Sequence[Text],
    counts: Sequence[int],
    *,
    length: int,
    seed: int,
    begins: str,
) -> dict[str, Any]:
    """Which sequences were calibrated on.

    Args:
      texts: the files.
      counts: sequences of each.
      length: tokens of each sequence.
      seed: by which they were drawn.
      begins: what they begin with.

    Returns:
      JSON-able.
    """
    return {
        "files": [
            {"name": text.path.name, "sha256": text.sha256, "sequences": count}
            for text, count in zip(texts, counts, strict=True)
        ],
        "sequences": sum(counts),
        "length": length,
        "seed": seed,
        "bos": begins,
    }


def sizes(
    source: CheckpointDir, counts: Mapping[str, tuple[int, int]]
) -> dict[str, int | float]:
    """Bytes of the weights as they are, and in a compact file.

    Args:
      source: the directory.
      counts: of each pruned tensor zeros and size; others count as dense.

    Returns:
      "dense_bytes", "compact_bytes", "zeros" and "size" of the pruned tensors.
    """
    packed = 0
    for name, info in source.tensors.items():
        zeros, size = counts.get(name, (0, 0))
        if name in counts:
            packed += stored_bytes(size - zeros, size, info.dtype.itemsize)
        else:
            packed += info.size
    return {
        "dense_bytes": sum(info.size for info in source.tensors.values()),
        "compact_bytes": packed,
        "zeros": sum(zeros for zeros, _ in counts.values()),
        "size": sum(size for _, size in counts.values()),
    }


def making(arguments: Iterable[str]) -> dict[str, Any]:
    """The command, the versions and the devices.

    Args:
      arguments: of the command.

    Returns:
      JSON-able.
    """
    return {
        "command": shlex.join(["jaxprune", *arguments]),
        "versions": machine.versions(),
        "device": machine.device(),
    }


def complete(out: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a written directory's record what was known later, and writes its page.

    Args:
      out: the directory.
      more: JSON-able; takes the place of entries of the same name.

    Returns:
      The whole record.

    Raises:
      OSError: a file could not be written; what was there is kept.
    """
    whole = rewrite.read_provenance(out) | dict(more)
    atomic.replace_json(out / rewrite.NAME, whole)
    atomic.replace(out / PAGE, pruned_model.document(whole).encode())
    return whole


def check_place(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses a taken place before anything is done.

    Args:
      out: where the result goes.
      source: what it is made from.
      overwrite: whether an earlier result may be replaced.

    Raises:
      ValueError: it may not go there.
    """
    place, origin = out.resolve(), source.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        raise ValueError(
            f"OUT must lie apart from MODEL, but '{place}' and '{origin}' are in each "
            "other; choose a directory beside it"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"OUT must be free, but '{out}' is there; choose another place, or give "
            "--overwrite if it is an earlier result"
        )
    known = {*rewrite.read_provenance(out)["files"], rewrite.NAME, PAGE}
    if foreign := sorted(e.name for e in out.iterdir() if e.name not in known):
        raise ValueError(
            f"--overwrite replaces earlier results only, but '{out}' also holds "
            f"{foreign[:6]}; move them elsewhere"
        )
