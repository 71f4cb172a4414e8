"""Finds the tensor of each leaf of a model in a directory.

Every tensor must belong to a leaf and every leaf must have its tensor: those that are
unknown, missing, doubled or of another shape are named together, in one error.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxprune.formats.checkpoint_dir import CheckpointDir, Damaged, Unknown
from jaxprune.models.hf.families.family import Family

_FLOATING = ("float32", "bfloat16", "float16", "float64")
_LISTED = 12


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
    family: Family,
    leaves: Mapping[str, tuple[int, ...]],
) -> dict[str, Source]:
    """Leaf name to tensor; raises `Damaged` or `Unknown` where they do not fit."""
    found: dict[str, list[str]] = {}  # name without the prefix to full names
    for name in directory.tensors:
        key = name.removeprefix(family.prefix)
        found.setdefault(family.renamed.get(key, key), []).append(name)
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
    copies = {key: leaf for key, leaf in family.copies.items() if key not in used}
    used.update(copies)
    unknown = [
        name
        for key, given in found.items()
        for name in given
        if key not in used and not re.fullmatch(family.skipped, key)
    ]
    doubled = [" and ".join(given) for given in found.values() if len(given) > 1]
    damage = {"missing": missing, "twice": doubled, "wrong": wrong}
    _refuse(directory, unknown, damage)
    for key, leaf in copies.items():
        for name in found.get(key, []):
            tied = names[leaf]
            _check_copy(directory, tied.name, name)
            names[leaf] = tied._replace(copies=(*tied.copies, name))
    return names


def _refuse(
    directory: CheckpointDir, unknown: list[str], damage: Mapping[str, list[str]]
) -> None:
    every = {"unknown": unknown, **damage}
    if found := [f"{what}: {listed(names)}" for what, names in every.items() if names]:
        kind = Damaged if any(damage.values()) else Unknown
        raise kind(
            f"'{directory.path}' must hold the tensors of the "
            f"{directory.config['model_type']} model that its config.json describes; "
            + "; ".join(found)
        )


def _check_copy(directory: CheckpointDir, embedding: str, copy: str) -> None:
    """Refuses a second copy of the embedding that has other bits."""
    one, other = directory.tensors[embedding], directory.tensors[copy]
    if (one.dtype, one.shape) == (other.dtype, other.shape):
        bits = np.dtype(f"u{one.dtype.itemsize}")
        a, b = (directory.read(name).view(bits) for name in (embedding, copy))
        step = max(1, 2**24 // max(1, one.shape[-1]))  # rows compared at a time
        if all(
            np.array_equal(a[i : i + step], b[i : i + step])
            for i in range(0, len(a), step)
        ):
            return
    raise Damaged(
        f"'{directory.path}' holds its embedding, {embedding}, again, but "
        f"{copy} differs from it; remove that, or, if it is a head of its own, set "
        "tie_word_embeddings to false in config.json"
    )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return first + (f" and {more} more" if more > 0 else "")
