"""How much time a pruning may take: one word in place of a method and its settings."""

from typing import Any, Literal, NamedTuple, TypeAlias

from jaxprune.arrays.rules import Rule, check
from jaxprune.posttraining.passes.base import Pass
from jaxprune.posttraining.passes.chaining import Chain, chain
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.passes.pruning import METHODS
from jaxprune.posttraining.passes.refinement import Refine

Effort: TypeAlias = Literal["quick", "good", "best"]


class Level(NamedTuple):
    """What is done at one level of effort.

    Attributes:
      method: name of the method, as in `METHODS`.
      correction: share that is made up for of what earlier matrices lost.
      refine: number of passes that refine each layer; 0 for none.
      own_text: whether a language model also calibrates on what it writes itself.
      recover_steps: steps in which a language model that is pruned by the command
        follows the dense one, in place of the refinement; 0 for none.
      recover_batch: number of sequences of each step.
    """

    method: Literal["sparsegpt", "alps"]
    correction: float
    refine: int
    own_text: bool
    recover_steps: int = 0
    recover_batch: int = 1


# Each is the lowest perplexity that was measured within its seconds, Gemma 3 270M
# without 60 % of its weights: docs/results/records/all_together.toml.
# The steps, on SmolLM2 135M and Gemma: docs/results/records/recovery_rates.toml.
LEVELS: dict[str, Level] = {
    "quick": Level("sparsegpt", 0.0, refine=0, own_text=False),
    "good": Level("alps", 0.5, refine=0, own_text=False),
    "best": Level("alps", 0.5, refine=4, own_text=True, recover_steps=256),
}
"""Name of a level of effort to what it does."""

_LEVEL = Rule(
    lambda v: v.level in v.levels,
    "effort must be one of {names}, got {level!r}",
)


def effort(level: Effort) -> Chain:
    """The passes that gave the best model within their time.

    On Gemma 3 270M and one core "quick" takes 3 minutes, "good" 7 and "best" half an
    hour; what the command lets the model write for the last takes 20 minutes more. On
    larger models the method of the last two takes a larger share: on layers of 7 B
    parameters three to eleven times as long as that of the first.

    Args:
      level: "quick" is SparseGPT; "good" is ALPS, which also makes up for half of what
        earlier matrices lost; "best" refines each layer after it, where
        `jaxprune prune` trains all pruned matrices together after the dense model.

    Returns:
      The passes in a row, whose sparsity `jp.prune_trained` is given.

    Raises:
      ValueError: there is no such level.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(keys[2], (32, 4))]
      >>> passes = jp.passes.effort("good")
      >>> pruned = jp.prune_trained(fn, params, batches, passes, sparsity=0.5)
      >>> jp.sparsity(pruned.params).total
      0.5
    """
    check([_LEVEL], level=level, levels=LEVELS, names=", ".join(LEVELS))
    method, correction, refine, *_ = LEVELS[level]
    solver: Any = METHODS[method]
    steps: list[Pass] = [solver(relative=True)]
    steps += [Correct(correction)] if correction else []
    steps += [Refine(passes=refine)] if refine else []
    return chain(*steps)
