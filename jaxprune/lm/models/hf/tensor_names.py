"""Finds the tensor of each leaf of a model in a directory.

Every tensor must belong to a leaf and every leaf must have its tensor: those that are
unknown, missing, doubled or of another shape are named together, in one error.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, Damaged, Unknown
from jaxprune.lm.models.hf.families.family import Family

_FLOATING = ("float32", "bfloat16", "float16", "float64")
_LISTED = 12


class Source(NamedTuple):
    """The tensor that a leaf was read from.

    Attributes:
      name: its name in the directory.
      transposed: whether its axes are the leaf's reversed.
      dtype: dtype in which it is stored there.
      copies: names under which the directory holds it again (a tied head).
      experts: number of tensors that the leaf is made of, one behind the other along
        its first axis, with their numbers in place of the "*" in the name; 0 for one
        alone.
    """

    name: str
    transposed: bool
    dtype: np.dtype
    copies: tuple[str, ...] = ()
    experts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the leaf is made of."""
        if not self.experts:
            return (self.name,)
        return tuple(self.name.replace("*", str(i)) for i in range(self.experts))

    def stored(self, leaf: Any, number: int) -> np.ndarray:
        """What the tensor of this number in `names`, or a copy, holds of a leaf."""
        array = np.asarray(jax.device_get(leaf[number] if self.experts else leaf))
        return array.T if self.transposed else array


def match_tensors(
    directory: CheckpointDir,
    family: Family,
    leaves: Mapping[str, tuple[int, ...]],
) -> dict[str, Source]:
    """Leaf name to tensor; raises `Damaged` or `Unknown` where they do not fit."""
    candidates: dict[str, list[str]] = {}  # name without the prefix to full names
    for name in directory.tensors:
        key = name.removeprefix(family.prefix)
        candidates.setdefault(family.renamed.get(key, key), []).append(name)
    names, wrong, used = {}, [], set()
    missing = []
    for leaf, shape in leaves.items():
        expected = tensor_source(family, leaf, shape, np.dtype("float32"))
        keys = [name.removeprefix(family.prefix) for name in expected.names]
        used.update(keys)
        if absent := [
            n for n, k in zip(expected.names, keys, strict=True) if k not in candidates
        ]:
            missing += absent
            continue
        stored = shape[1:] if expected.experts else shape
        # Torch stores [out, in].
        stored = stored[::-1] if expected.transposed else stored
        for key in keys:
            info = directory.tensors[candidates[key][0]]
            if info.shape != stored:
                wrong.append(f"{candidates[key][0]} is {info.shape} and not {stored}")
            if info.dtype.name not in _FLOATING:
                wrong.append(
                    f"{candidates[key][0]} is {info.dtype}, which is not floating"
                )
        names[leaf] = _stored(directory, expected, [candidates[key][0] for key in keys])
    copies = {key: leaf for key, leaf in family.copies.items() if key not in used}
    used.update(copies)  # a tied head that is stored again
    unknown = [
        name
        for key, tensors in candidates.items()
        for name in tensors
        if key not in used and not re.fullmatch(family.skipped, key)
    ]
    doubled = [
        " and ".join(tensors) for tensors in candidates.values() if len(tensors) > 1
    ]
    damage = {"missing": missing, "twice": doubled, "wrong": wrong}
    _refuse(directory, unknown, damage)
    for key, leaf in copies.items():
        for name in candidates.get(key, []):
            tied = names[leaf]
            _check_copy(directory, tied.name, name)
            names[leaf] = tied._replace(copies=(*tied.copies, name))
    return names


def tensor_source(
    family: Family, leaf: str, shape: tuple[int, ...], dtype: np.dtype
) -> Source:
    """Where a leaf of this shape and dtype belongs in a new directory of a family."""
    name, transposed = family.source(leaf)
    return Source(name, transposed, dtype, experts=shape[0] if "*" in name else 0)


def _stored(directory: CheckpointDir, expected: Source, tensors: list[str]) -> Source:
    """A source with the names and the dtype that a directory has it by."""
    dtypes = [directory.tensors[name].dtype for name in tensors]
    if not expected.experts:
        return expected._replace(name=tensors[0], dtype=dtypes[0])
    # The prefix may be left out there, of all or of none.
    name = (
        expected.name
        if tensors[0] == expected.names[0]
        else expected.name.split(".", 1)[1]
    )
    together = expected._replace(name=name, dtype=dtypes[0])
    if list(together.names) != tensors or len({*dtypes}) > 1:
        raise Unknown(
            f"'{directory.path}' must hold the experts {expected.name} in one dtype "
            "and with one prefix, but they differ; save the model again with "
            "transformers"
        )
    return together


def _refuse(
    directory: CheckpointDir, unknown: list[str], damage: Mapping[str, list[str]]
) -> None:
    problems = {"unknown": unknown, **damage}
    if phrases := [
        f"{what}: {_listed(names)}" for what, names in problems.items() if names
    ]:
        error = Damaged if any(damage.values()) else Unknown
        raise error(
            f"'{directory.path}' must hold the tensors of the "
            f"{directory.config['model_type']} model that its config.json describes; "
            + "; ".join(phrases)
        )


def _check_copy(directory: CheckpointDir, embedding: str, copy: str) -> None:
    """Refuses a second copy of the embedding that has other bits."""
    embedding_info, copy_info = directory.tensors[embedding], directory.tensors[copy]
    if (embedding_info.dtype, embedding_info.shape) == (
        copy_info.dtype,
        copy_info.shape,
    ):
        # NaN equals itself bit for bit.
        bits = np.dtype(f"u{embedding_info.dtype.itemsize}")
        a, b = (directory.read(name).view(bits) for name in (embedding, copy))
        # Rows compared at a time.
        step = max(1, 2**24 // max(1, embedding_info.shape[-1]))
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


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(names[:_LISTED])
    further = len(names) - _LISTED
    return first + (f" and {further} more" if further > 0 else "")
