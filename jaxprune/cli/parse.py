"""What the words of a command mean: methods, and which tensors stay dense."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed
from jaxprune.formats.checkpoint_dir import TensorInfo
from jaxprune.posttraining import methods


def method(
    name: methods.Name, damping: float | None, inputs: methods.Inputs
) -> methods.Method:
    """A method with the settings asked for; damping None is the method's own."""
    found: Any = methods.named(name)
    own = {field.name for field in dataclasses.fields(found)}
    if damping is not None and "damping" not in own:
        raise ValueError(f"--damping is for sparsegpt and alps, not for {name}")
    if damping is not None and not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"--damping must be positive, got {damping}")
    if inputs != found.inputs and "inputs" not in own:
        raise ValueError(f"--inputs is for methods that look at inputs, not for {name}")
    asked = {"damping": damping, "inputs": inputs}
    return dataclasses.replace(
        found, **{k: v for k, v in asked.items() if k in own and v is not None}
    )


def why_kept(name: str, info: TensorInfo, exclude: Sequence[str] = ()) -> str | None:
    """Why a tensor of a directory is not pruned, in a few words; None if it may be."""
    if why := tree.why_unprunable(name.replace(".", "/"), info):
        return why
    if info.ndim > 3 or (info.ndim == 3 and "conv" in name.lower()):
        return "a convolution"
    return "excluded" if matches(name, exclude) else None


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a tensor's name matches a glob, written with "." or with "/"."""
    names = (name.replace("/", "."), name.replace(".", "/"))
    return any(fnmatch.fnmatchcase(n, glob) for glob in globs for n in names)


def check_globs(globs: Sequence[str], tensors: dict[str, TensorInfo]) -> None:
    """Refuses a glob that excludes nothing, and globs that exclude all."""
    free = [name for name, info in tensors.items() if why_kept(name, info) is None]
    if unused := [glob for glob in globs if not any(matches(n, [glob]) for n in free)]:
        raise ValueError(
            f"every --exclude must match a tensor that would be pruned, but "
            f"{listed(unused)} match none of {listed(free)}; `jaxprune inspect` lists "
            "them all"
        )
    if not [name for name in free if not matches(name, globs)]:
        raise ValueError(
            f"a tensor must be left to prune, but --exclude leaves none of "
            f"{listed(free)}; exclude less"
        )


def check_at_least_one(**options: int | None) -> None:
    """Refuses numbers under 1, given by the names of their options; None is fine."""
    for name, value in options.items():
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {value}")


def by_name(
    names: Callable[[str], str], exclude: Sequence[str]
) -> Callable[[str, Any], bool]:
    """The rule for leaves, whose exclusions are globs of the tensors' names."""

    def rule(name: str, leaf: Any) -> bool:
        return tree.prunable(name, leaf) and not matches(names(name), exclude)

    return rule
