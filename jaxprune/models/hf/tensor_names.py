"""Which tensor of a directory is which leaf: all of them, or one error with all of it.

Tensors that are unknown, missing, doubled or of another shape are told together.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from jaxprune.formats.checkpoint_dir import CheckpointDir, Damaged, Unknown

_FLOATING = ("float32", "bfloat16", "float16", "float64")
_LISTED = 12


class Names(Protocol):
    """A family's table of names."""

    @property
    def prefix(self) -> str:
        """What most names begin with; base models leave it out."""

    @property
    def skipped(self) -> str:
        """A pattern of tensors that hold nothing learned."""

    def source(self, leaf: str) -> tuple[str, bool]:
        """The tensor of a leaf, and whether its axes are the leaf's reversed."""


class Source(NamedTuple):
    """The tensor that a leaf was read from.

    Attributes:
        name: its name in the directory.
        transposed: whether its axes are the leaf's reversed.
        dtype: how it is stored there.
        copies: names under which the directory holds it again (a tied head).
    """

    name: str
    transposed: bool
    dtype: np.dtype
    copies: tuple[str, ...] = ()


def match(
    directory: CheckpointDir,
    family: Names,
    leaves: Mapping[str, tuple[int, ...]],
    copies: Mapping[str, str],
) -> dict[str, Source]:
    """Finds the tensor of each leaf.

    Args:
        directory: the model's folder.
        family: its table of names.
        leaves: leaf name to shape.
        copies: tensors, without the prefix, that may be there again: to the leaf.

    Returns:
        Leaf name to tensor.

    Raises:
        directory.Damaged: a tensor is missing, doubled or of another shape.
        directory.Unknown: a tensor is none of the model's.
    """
    found: dict[str, list[str]] = {}
    for name in directory.tensors:
        found.setdefault(name.removeprefix(family.prefix), []).append(name)
    names, wrong, used = {}, [], set()
    missing = []
    for leaf, shape in leaves.items():
        theirs, transposed = family.source(leaf)
        key = theirs.removeprefix(family.prefix)
        used.add(key)
        if key not in found:
            missing.append(theirs)
            continue
        info = directory.tensors[found[key][0]]
        stored = shape[::-1] if transposed else shape
        if info.shape != stored:
            wrong.append(f"{found[key][0]} is {info.shape} and not {stored}")
        if info.dtype.name not in _FLOATING:
            wrong.append(f"{found[key][0]} is {info.dtype}, which is not floating")
        names[leaf] = Source(found[key][0], transposed, info.dtype)
    used.update(copies)
    unknown = [
        name
        for key, given in found.items()
        for name in given
        if key not in used and not re.fullmatch(family.skipped, key)
    ]
    doubled = [" and ".join(given) for given in found.values() if len(given) > 1]
    _refuse(directory, unknown, missing, doubled, wrong)
    for key, leaf in copies.items():
        for name in found.get(key, []):
            tied = names[leaf]
            _same(directory, tied.name, name)
            names[leaf] = tied._replace(copies=(*tied.copies, name))
    return names


def _refuse(
    directory: CheckpointDir,
    unknown: list[str],
    missing: list[str],
    doubled: list[str],
    wrong: list[str],
) -> None:
    told = [
        f"{what} {listed(names)}"
        for what, names in (
            ("unknown:", unknown),
            ("missing:", missing),
            ("twice:", doubled),
            ("wrong:", wrong),
        )
        if names
    ]
    if told:
        kind = Damaged if missing or doubled or wrong else Unknown
        raise kind(
            f"'{directory.path}' must hold the tensors of the "
            f"{directory.config['model_type']} model that its config.json describes; "
            + "; ".join(told)
            + "."
        )


def _same(directory: CheckpointDir, embedding: str, copy: str) -> None:
    one, other = directory.tensors[embedding], directory.tensors[copy]
    if (one.dtype, one.shape) == (other.dtype, other.shape):
        bits = np.dtype(f"u{one.dtype.itemsize}")
        a, b = (directory.read(name).view(bits) for name in (embedding, copy))
        step = max(1, 2**24 // max(1, one.shape[-1]))
        if all(
            np.array_equal(a[i : i + step], b[i : i + step])
            for i in range(0, len(a), step)
        ):
            return
    raise Damaged(
        f"'{directory.path}' holds its embedding, {embedding}, again, but "
        f"{copy} differs from it; remove that, or, if it is a head of its own, set "
        "tie_word_embeddings to false in config.json."
    )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    told = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return told + (f" and {more} more" if more > 0 else "")
