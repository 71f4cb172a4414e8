"""What the words of a command mean: patterns, methods, which tensors are left alone."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from jaxprune.arrays import tree
from jaxprune.formats.checkpoint_dir import TensorInfo
from jaxprune.masking import allocation, patterns
from jaxprune.posttraining import methods
from jaxprune.typing import Pattern

SHARES: dict[str, allocation.Rule] = {
    "uniform": allocation.Uniform(),
    "erk": allocation.ERK(),
    "owl": allocation.OWL(),
}
SharesName = Literal["uniform", "erk", "owl"]


def pattern(text: str | None) -> Pattern | None:
    """A pattern from its word.

    Args:
      text: "per-layer", "per-output", "n:m" as in "2:4", "RxC" as in "16x16" (inputs x
        outputs), or None.

    Returns:
      The pattern; None for None.

    Raises:
      ValueError: the word is none of these.

    Example:
      >>> pattern("2:4")
      NM(n=2, m=4)
    """
    if text is None:
        return None
    if text in ("per-layer", "unstructured"):
        return patterns.Unstructured()
    if text == "per-output":
        return patterns.PerOutput()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return patterns.NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return patterns.Block(int(found[1]), int(found[2]))
    raise ValueError(
        f"--pattern must be per-layer, per-output, n:m as in 2:4, or a block as in "
        f"16x16, got '{text}'"
    )


def check_sparsity(sparsity: float | None, of: Pattern) -> None:
    """Refuses a sparsity outside [0, 1), missing, or at odds with the pattern.

    Args:
      sparsity: what was asked for.
      of: the pattern.

    Raises:
      ValueError: it does not fit.
    """
    fixed = of.sparsity
    if sparsity is None and fixed is None:
        raise ValueError(
            "--sparsity must say the share to remove, for example --sparsity 0.5"
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity must be in [0, 1), got {sparsity}")
    if None not in (sparsity, fixed) and sparsity != fixed:
        raise ValueError(
            f"--pattern {of} removes exactly {fixed}, but --sparsity {sparsity} was "
            "asked for; leave --sparsity out"
        )


def method(
    name: methods.Name, damping: float | None, inputs: methods.Inputs
) -> methods.Method:
    """A method with the settings asked for.

    Args:
      name: its name.
      damping: a share of the Hessian's mean diagonal, or None for the usual.
      inputs: which inputs weights are pruned for.

    Returns:
      The method.

    Raises:
      ValueError: the method has no such setting, or the damping is not positive.
    """
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
    """Why a tensor is not pruned; None where it may be.

    Args:
      name: its name in the directory.
      info: its shape and dtype.
      exclude: globs of names.

    Returns:
      A few words, or None.
    """
    if not tree.is_floating(info):
        return "not floating"
    if info.ndim < 2:
        return "a vector"
    if info.ndim > 3 or (info.ndim == 3 and "conv" in name.lower()):
        return "a convolution"
    if not tree.prunable(name.replace(".", "/"), info):
        return "an embedding, norm, bias or head"
    if matches(name, exclude):
        return "excluded"
    return None


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a tensor's name matches a glob, written with "." or with "/"."""
    names = (name.replace("/", "."), name.replace(".", "/"))
    return any(fnmatch.fnmatchcase(n, glob) for glob in globs for n in names)


def check_globs(globs: Sequence[str], tensors: dict[str, TensorInfo]) -> None:
    """Refuses a glob that excludes nothing, and globs that exclude all.

    Args:
      globs: of names.
      tensors: of the directory.

    Raises:
      ValueError: so.
    """
    free = [name for name, info in tensors.items() if why_kept(name, info) is None]
    if idle := [glob for glob in globs if not any(matches(n, [glob]) for n in free)]:
        raise ValueError(
            f"every --exclude must match a tensor that would be pruned, but {idle} "
            f"match none of {free[:6]}; `jaxprune inspect` lists them all"
        )
    if not [name for name in free if not matches(name, globs)]:
        raise ValueError(
            "a tensor must be left to prune, but --exclude leaves none of "
            f"{free[:6]}; exclude less"
        )


def by_name(
    names: Callable[[str], str], exclude: Sequence[str]
) -> Callable[[str, Any], bool]:
    """The rule for leaves, whose exclusions speak of the directory's names.

    Args:
      names: a leaf's name to its tensor's.
      exclude: globs of tensors' names.

    Returns:
      For `prunable=`.
    """

    def rule(name: str, leaf: Any) -> bool:
        return tree.prunable(name, leaf) and not matches(names(name), exclude)

    return rule
