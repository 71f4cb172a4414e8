"""A pass that trains what is left of a block; `Refiner` does it.

See `jaxprune.posttraining.refiner` for the loss and for what a block is.
"""

import dataclasses

from jaxprune.arrays.messages import refuse_fractions
from jaxprune.arrays.rules import Rule, check
from jaxprune.posttraining.passes.base import Observation, Pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine(Pass):
    """Gradient steps on each layer's kept weights, towards the dense layer's output.

    Adam, its learning rate falling to zero along a cosine, one step a batch. Trained
    are the kept weights of the pruned matrices, and the floating vectors that one layer
    alone reads: norms and biases, and running statistics too if they are among the
    parameters, so let the function close over `batch_stats`. Zeros stay zeros. After
    each pass the loss is measured on batches that are not trained on; the best values
    are kept, those before the first step among them. The function must be
    differentiable, and its result is what the last layer is measured by: return final
    hidden states rather than logits.

    Attributes:
      passes: number of times that each batch is trained on, at most.
      learning_rate: learning rate of the first step.
      held_out: share of the batches, the last ones, that measure; at least one.
      patience: number of passes without a better loss after which it ends.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 6)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(key, (32, 4)) for key in keys[2:]]
      >>> pruned = jp.prune_trained(fn, params, batches, jp.passes.chain(
      ...     jp.passes.wanda(0.5), jp.passes.refine(learning_rate=1e-2)))
      >>> jp.sparsity(pruned.params).total
      0.5
      >>> all(row["after"] < row["before"] for row in pruned.report["refined"])
      True

    Reference:
      The objective is that of block-wise fine-tuning after pruning, with the dense
      stream as the target and the pruned one as the input; ours divides by each token's
      own norm and chooses the pass by batches that are held out.
    """

    passes: int = 8
    learning_rate: float = 1e-4
    held_out: float = 0.1
    patience: int = 2

    def __post_init__(self) -> None:
        """Refuses what is no training."""
        refuse_fractions("refine", passes=self.passes, patience=self.patience)
        check(_TRAINING, **dataclasses.asdict(self))

    @property
    def observes(self) -> frozenset[Observation]:
        """What the dense model computes at the end of each block."""
        return frozenset({"outputs"})

    def split(self, batches: int) -> int:
        """How many of the batches are trained on; the others measure.

        Args:
          batches: number of batches.

        Returns:
          The number of those that are trained on, the first ones.

        Raises:
          ValueError: there is none to measure by.
        """
        check(_MEASURED, batches=batches)
        return batches - min(batches - 1, max(1, round(batches * self.held_out)))


_TRAINING = [
    Rule(
        lambda v: v.passes >= 1 and v.patience >= 1,
        "a refinement needs passes and patience of at least 1, got passes={passes} and "
        "patience={patience}",
        "leave refine out to do without",
    ),
    Rule(
        lambda v: 0 < v.learning_rate < 1 and 0 < v.held_out < 1,
        "a refinement needs a learning rate and a share to hold out in (0, 1), got "
        "learning_rate={learning_rate} and held_out={held_out}",
    ),
]
_MEASURED = [
    Rule(
        lambda v: v.batches >= 2,
        "refine needs at least two batches, one of them to measure by, got {batches}",
        "cut the batches smaller",
    )
]
