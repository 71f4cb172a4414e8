"""What a job asks of the library: one place for methods and `prune_trained`.

The words of the command become values here, and nowhere else.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jaxprune as jp
from jaxprune.arrays.messages import one_line
from jaxprune.lm.steps.settings import PruneJob, Pruning
from jaxprune.masking import allocation as allocations
from jaxprune.masking import counts, patterns
from jaxprune.posttraining.passes import METHODS, Chain, correct, quantize
from jaxprune.posttraining.passes.efforts import LEVELS
from jaxprune.posttraining.passes.quantization import Quantize
from jaxprune.typing import Pattern

CORRECTION = 0.5
"""How much of what was lost before the command makes up for, if nothing is said."""


class Pass(NamedTuple):
    """What a pruning's words mean.

    Attributes:
      method: how a matrix is pruned, with the correction of its target.
      pattern: which weights are pruned together.
      sparsity: share to remove.
      allocation: how the sparsity is shared out.
      quantizer: pass that puts the weights that stay on levels, or None.
    """

    method: Chain
    pattern: Pattern
    sparsity: Any
    allocation: allocations.Rule
    quantizer: Quantize | None

    @property
    def chain(self) -> Chain:
        """All passes in a row with their settings, as `jp.prune_trained` takes them."""
        steps = (self.method, self.quantizer)
        chained = jp.passes.chain(*(step for step in steps if step is not None))
        return chained.with_settings(
            sparsity=self.sparsity, pattern=self.pattern, allocation=self.allocation
        )

    def facts(self) -> dict[str, Any]:
        """What decides the pruned weights, in words."""
        levels = self.chain.quantization
        return {
            "settings": describe(self.method),
            "pattern": pattern_word(self.pattern),
            "quantization": describe(levels) if levels else None,
        }


def choose_method(name: str, correction: float | None = None) -> Chain:
    """A method as it was best on real models.

    Where it looks at inputs, tokens count by their direction alone, and where it
    updates weights, each matrix makes up for a part of what earlier ones lost. The
    papers do neither; `jp.prune_trained` takes their settings.

    Args:
      name: name of the method.
      correction: share of the earlier loss that is made up for.

    Returns:
      The method, chained with the correction of its target where it has one.

    Example:
      >>> from jaxprune.lm.steps import passes
      >>> passes.choose_method("wanda").pruning.settings
      {'inputs': 'left', 'relative': True}
    """
    make: Any = METHODS[name]
    method = make()
    if "relative" in method.settings:
        method = make(relative=True)
    share = CORRECTION if correction is None else correction
    if not share or "hessian" not in method.observes:
        return jp.passes.chain(method)
    return jp.passes.chain(method, correct(share))


def choose_pattern(pruning: Pruning) -> Pattern:
    """Which weights are pruned together: as asked for, or as the method's paper has."""
    if pruning.passes is not None:
        pruned = pruning.passes.pruning
        return patterns.parse(pruned.pattern or pruned.usual_pattern)
    word = pruning.pattern
    if word and not re.fullmatch(r"unstructured|per-output|\d+:\d+|\d+x\d+", word):
        raise ValueError(
            "--pattern must be one of unstructured, per-output, n:m as in 2:4, or a "
            f"block as in 16x16, got '{one_line(word)}'"
        )
    method = METHODS[pruning.method or "sparsegpt"]()
    return patterns.parse(word or method.usual_pattern)


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


def choose_pass(job: PruneJob) -> Pass:
    """What the words of a pruning mean; refuses values that do not agree."""
    pruning, bits = job.pruning, job.pruning.bits
    if (chain := pruning.passes) is not None:
        pattern = choose_pattern(pruning)
        rule: Any = chain.pruning.allocation
        return Pass(
            chain, pattern, *counts.agreed(pruning.sparsity, pattern, rule), None
        )
    # "quick" leaves the correction out, which takes as long as the rest.
    correction = LEVELS[pruning.effort].correction if pruning.effort else None
    method = choose_method(pruning.method or "sparsegpt", correction)
    pattern = choose_pattern(pruning)
    sparsity, rule = counts.agreed(pruning.sparsity, pattern, pruning.allocation)
    quantizer = None
    if bits is not None:
        levels: Any = f"int{bits}"
        quantizer = quantize(levels, group=pruning.group)
    return Pass(method, pattern, sparsity, rule, quantizer)


def describe(value: Any) -> str:
    """The settings of a method or of another value, in words."""
    words = (
        f"{name.replace('_', ' ')} {'yes' if setting is True else setting}"
        for name, setting in _settings(value).items()
        if setting is not False and setting is not None
    )
    return ", ".join(words) or "none"


def _settings(value: Any) -> dict[str, Any]:
    """The settings of a chain's passes, or of another value, by name."""
    if not isinstance(value, Chain):
        return dataclasses.asdict(value)
    solves = "hessian" in value.observes
    correction = {"correction": value.correction} if solves else {}
    return {**value.pruning.settings, **correction}
