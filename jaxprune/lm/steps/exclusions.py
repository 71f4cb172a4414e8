"""Which tensors of a directory stay dense, and why."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxprune import leaves
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints.checkpoint_dir import TensorInfo
from jaxprune.typing import Prunable


def why_kept(name: str, info: TensorInfo, exclude: Sequence[str] = ()) -> str | None:
    """Why a tensor of a directory is not pruned, in a few words; None if it may be."""
    if why := leaves.why_unprunable(name.replace(".", "/"), info):
        return why
    if info.dtype.itemsize == 1:  # scaled elsewhere, so its size says nothing
        return "of one byte a weight"
    if info.ndim > 3 or (info.ndim == 3 and "conv" in name.lower()):
        return "a convolution"
    return "excluded" if matches_any(name, exclude) else None


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Whether a tensor's name matches a glob, written with "." or with "/"."""
    # In files a name has dots, in Python slashes.
    spellings = (name.replace("/", "."), name.replace(".", "/"))
    return any(fnmatch.fnmatchcase(s, glob) for glob in globs for s in spellings)


def check_globs(
    globs: Sequence[str],
    tensors: Mapping[str, Any],
    why: Callable[[str, Any], str | None] = why_kept,
) -> None:
    """Refuses a glob that excludes nothing, and globs that exclude all."""
    reasons = {name: why(name, info) for name, info in tensors.items()}
    # Before any exclusion.
    free = [name for name, why in reasons.items() if why is None]
    unused = [g for g in globs if not any(matches_any(name, [g]) for name in free)]
    if unused:
        raise ValueError(
            "every --exclude must match a tensor that would be pruned, but "
            f"{listed(unused)} match none of {listed(free)}; `jaxprune inspect` lists "
            "them all"
        )
    if not free:
        raise ValueError(
            "a model must have a tensor that may be pruned, but all of its tensors "
            "are left alone: "
            f"{', '.join(sorted({str(why) for why in reasons.values()}))}; `jaxprune "
            "inspect` lists them"
        )
    if not any(not matches_any(name, globs) for name in free):
        raise ValueError(
            "a tensor must be left to prune, but --exclude leaves none of "
            f"{listed(free)}; exclude less"
        )


def prunable_tensor(exclude: Sequence[str]) -> Callable[[str, TensorInfo], bool]:
    """The rule for tensors of a directory that is pruned without its model."""
    return lambda name, info: why_kept(name.replace("/", "."), info, exclude) is None


def prunable_leaf(
    tensors: Callable[[str], Sequence[str]], exclude: Sequence[str]
) -> Prunable:
    """The rule for leaves of a model, whose exclusions are globs of their tensors.

    Args:
      tensors: name of a leaf to the names of its tensors: experts are several.
      exclude: globs on the names of tensors.

    Returns:
      Whether a leaf, by its name and shape, may be pruned.
    """

    def may_be_pruned(name: str, leaf: Any) -> bool:
        if not leaves.prunable(name, leaf):
            return False
        parts = tensors(name)
        excluded = sum(matches_any(tensor, exclude) for tensor in parts)
        # A leaf is pruned as a whole, so its experts cannot be told apart.
        if excluded not in (0, len(parts)):
            raise ValueError(
                "--exclude must match all experts of a layer's matrix or none, but "
                f"matches {excluded} of {len(parts)} such as {parts[0]}; write '*' in "
                "place of the expert's number"
            )
        return not excluded

    return may_be_pruned
