"""How much time a pruning may take: one word in place of a method and its settings."""

from typing import Any, Literal, NamedTuple, TypeAlias

from jaxprune.posttraining.passes.base import Pass
from jaxprune.posttraining.passes.chaining import Chain, chain
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.passes.pruning import METHODS

Effort: TypeAlias = Literal["quick", "good", "best"]


class Level(NamedTuple):
    """What is done at one level of effort.

    Attributes:
      method: name of the method, as in `METHODS`.
      correction: share that is made up for of what earlier matrices lost.
      own_text: whether a language model also calibrates on what it writes itself.
      recover_steps: steps in which a language model that is pruned by the command
        follows the dense one; 0 for none.
      recover_batch: number of sequences of each step.
    """

    method: Literal["sparsegpt", "alps"]
    correction: float
    own_text: bool
    recover_steps: int = 0
    recover_batch: int = 1


LEVELS: dict[str, Level] = {
    "quick": Level("sparsegpt", 0.0, own_text=False),
    "good": Level("alps", 0.5, own_text=False),
    "best": Level("alps", 0.5, own_text=True, recover_steps=256),
}
"""Name of a level of effort to what it does."""


def effort(level: Effort) -> Chain:
    """The passes that gave the best model within their time.

    On Gemma 3 270M and one core "quick" takes 3 minutes and "good" 7. On larger models
    ALPS takes a larger share: on layers of 7 B parameters three to eleven times as long
    as SparseGPT.

    Args:
      level: "quick" is SparseGPT; "good" is ALPS, which also makes up for half of what
        earlier matrices lost; "best" is the same here, after which `jaxprune prune`
        trains all pruned matrices together after the dense model.

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
    if level not in LEVELS:
        raise ValueError(f"effort must be one of {', '.join(LEVELS)}, got {level!r}")
    method, correction, *_ = LEVELS[level]
    solver: Any = METHODS[method]
    steps: list[Pass] = [solver(relative=True)]
    steps += [Correct(correction)] if correction else []
    return chain(*steps)
