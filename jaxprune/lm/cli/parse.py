"""What the words of a command mean: methods, and which tensors stay dense."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxprune import leaves
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints.checkpoint_dir import TensorInfo
from jaxprune.masking import patterns
from jaxprune.posttraining import passes
from jaxprune.posttraining.passes.base import Inputs
from jaxprune.posttraining.passes.pruning import Name
from jaxprune.typing import Pattern

CORRECTION = 0.5
"""How much of what was lost before the command makes up for, if nothing is said."""


def method(
    name: Name,
    damping: float | None,
    inputs: Inputs,
    *,
    relative: bool | None = None,
    correction: float | None = None,
) -> passes.Chain:
    """A method with the settings asked for.

    Args:
      name: of the method.
      damping: None is the method's own.
      inputs: as of the method.
      relative: None is yes, which was best on real models, where the method has it.
      correction: None is CORRECTION, for the same reason, where it can be.

    Returns:
      The method.

    Raises:
      ValueError: the method has no such setting, or not this value of it.
    """
    found: Any = passes.METHODS[name]()
    own = {field.name for field in dataclasses.fields(found)}
    own |= {"correction"} if "hessian" in found.observes else set()
    if damping is not None and "damping" not in own:
        raise ValueError(f"--damping is for sparsegpt and alps, not for {name}")
    if damping is not None and not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"--damping must be positive, got {damping}")
    if inputs != found.inputs and "inputs" not in own:
        raise ValueError(f"--inputs is for methods that look at inputs, not for {name}")
    if relative is not None and "relative" not in own:
        raise ValueError(
            f"--relative is for methods that look at inputs, not for {name}"
        )
    if correction and "correction" not in own:
        raise ValueError(f"--correction is for sparsegpt and alps, not for {name}")
    if correction and inputs == "dense":
        raise ValueError(
            "--correction goes by the inputs that earlier layers leave; give it "
            "without --inputs dense"
        )
    asked: dict[str, Any] = {
        "damping": damping,
        "inputs": inputs,
        "relative": relative is None or relative,
        "correction": correction,
    }
    if correction is None and inputs == "left":
        asked["correction"] = CORRECTION
    asked = {k: v for k, v in asked.items() if k in own and v is not None}
    share = asked.pop("correction", 0.0)
    steps = [passes.correct(share)] if share else []
    return passes.chain(dataclasses.replace(found, **asked), *steps)


def settings(value: Any) -> str:
    """The settings of a method or of another value, in words."""
    words = (
        f"{name.replace('_', ' ')} {'yes' if setting is True else setting}"
        for name, setting in _settings(value).items()
        if setting is not False and setting is not None
    )
    return ", ".join(words) or "none"


def _settings(value: Any) -> dict[str, Any]:
    """The settings of a chain's passes, or of another value, by name."""
    if not isinstance(value, passes.Chain):
        return dataclasses.asdict(value)
    own = value.pruning.settings
    more = {"correction": value.correction} if "hessian" in value.observes else {}
    return {**own, **more}


def why_kept(name: str, info: TensorInfo, exclude: Sequence[str] = ()) -> str | None:
    """Why a tensor of a directory is not pruned, in a few words; None if it may be."""
    if why := leaves.why_unprunable(name.replace(".", "/"), info):
        return why
    if info.dtype.itemsize == 1:
        return "of one byte a weight"
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
    if not free:
        reasons = {why_kept(name, info) for name, info in tensors.items()}
        raise ValueError(
            "a model must have a tensor that may be pruned, but all of its tensors are "
            f"left alone: {', '.join(sorted(map(str, reasons)))}; `jaxprune inspect` "
            "lists them"
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


def check_idle(options: Any, needed: str, on: Any, *names: str) -> None:
    """Refuses options that do nothing without another one, which is `on` or not."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        if not on and getattr(options, name) != defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')} needs {needed}")


def check_seed(seed: int) -> None:
    """Refuses a seed that no generator takes."""
    if not 0 <= seed < 2**32:  # JAX reads 32 bits
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {seed}")


def pattern_word(pattern: Pattern) -> str:
    """A pattern as --pattern takes it."""
    match pattern:
        case patterns.NM():
            return f"{pattern.n}:{pattern.m}"
        case patterns.Block():
            return f"{pattern.rows}x{pattern.columns}"
        case patterns.Unstructured():
            return "unstructured"
        case patterns.PerOutput():
            return "per-output"
    return str(pattern)


_SPOKEN = (
    (r"pass overwrite=True", "give --overwrite"),
    (r"(?:with )?prunable=jp\.tree\.excluding\((.*?)\)", r"with --exclude \1"),
    (r"name an attribute in ignore_config", "give --ignore-config ATTRIBUTE"),
    (r"(?<![/\w'])sparsity=(\d[\d.]*)(?![/\w])", r"--sparsity \1"),
    (r", or a value such as jp\.patterns\.NM\(2, 4\)", ""),
    (r", or a value of jp\.patterns", ""),
    (r"Unstructured\(\)", "per-layer"),
    (r"PerOutput\(\)", "per-output"),
    (r"NM\(n=(\d+), m=(\d+)\)", r"\1:\2"),
    (r"Block\(rows=(\d+), columns=(\d+)\)", r"\1x\2"),
)


def spoken(sentence: str) -> str:
    """A refusal in the words of the command, where Python's say what to pass."""
    for python, command in _SPOKEN:
        sentence = re.sub(python, command, sentence)
    return sentence


def streamed(exclude: Sequence[str]) -> Callable[[str, TensorInfo], bool]:
    """The rule for tensors of a directory that is pruned without its model."""
    return lambda name, info: why_kept(name.replace("/", "."), info, exclude) is None


def by_name(
    names: Callable[[str], Sequence[str]], exclude: Sequence[str]
) -> Callable[[str, Any], bool]:
    """The rule for leaves, whose exclusions are globs of their tensors' names."""

    def rule(name: str, leaf: Any) -> bool:
        if not leaves.prunable(name, leaf):
            return False
        left = [matches(theirs, exclude) for theirs in names(name)]
        if any(left) and not all(left):
            raise ValueError(
                "--exclude must match all experts of a layer's matrix or none, but "
                f"matches {sum(left)} of {len(left)} such as {names(name)[0]}; write "
                "'*' in place of the expert's number"
            )
        return not any(left)

    return rule
