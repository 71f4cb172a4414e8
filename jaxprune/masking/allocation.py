"""One sparsity, many matrices: what share of each goes.

A rule gives each weight its share; the shares add up to the sparsity asked for of all
weights together. `Ranked` takes them from one global ranking: by the trajectory score,
where the optimizer's state is still there, layers that the loss reacts to keep more.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.masking import counts as allocate
from jaxprune.masking import masks
from jaxprune.scores import from_activations as activations
from jaxprune.typing import Scores


class Weight(NamedTuple):
    """What a rule may know of a weight.

    Attributes:
      product: where it is and how it is seen.
      matrix: gives it as (batch, in, out).
      mean_square: of its input's features (batch, in), from the dense model; None where
        the rule does not ask for it.
    """

    product: LinearOp
    matrix: Any
    mean_square: jax.Array | None


class Shares(Protocol):
    """How a sparsity is shared out.

    Attributes:
      needs_inputs: whether it reads the mean squares of the dense model's inputs.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads the mean squares of the dense model's inputs."""

    def of(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The share of each weight that goes."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same share of every weight."""

    needs_inputs = False

    def of(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The share of each weight that goes."""
        return [Fraction(allocate.checked(sparsity))] * len(weights)


@dataclasses.dataclass(frozen=True)
class ERK:
    """Erdos-Renyi-Kernel: the kept share goes as (in + out) / (in out).

    Weights that would keep more than all keep all, and the rest shares what is left.

    Reference:
      Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets
      Winners", 2020, arXiv 1911.11134, section 3.
    """

    needs_inputs = False

    def of(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The share of each weight that goes."""
        shapes = [weight.product.shape for weight in weights]
        return exact(
            1 - _capped([(i + o) / (i * o) for _, i, o in shapes], weights, sparsity),
            weights,
            sparsity,
        )


@dataclasses.dataclass(frozen=True)
class OWL:
    """Layers with more outliers keep more.

    An outlier is a weight whose Wanda score is above `factor` times its layer's mean.
    The kept share of a layer (a block of the model) grows linearly with its share of
    outliers, within plus or minus `spread`, the mean over layers being as asked for.

    Attributes:
      spread: the paper's lambda.
      factor: the paper's M.

    Reference:
      Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
      Pruning LLMs to High Sparsity", 2023, arXiv 2310.05175, equation 2. Here the
      shares are shifted together so that the sparsity of all weights is exact, where
      layers differ in size.
    """

    spread: float = 0.08
    factor: float = 5.0
    needs_inputs = True

    def of(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The share of each weight that goes."""
        blocks = [block_of(weight.product) for weight in weights]
        totals = {block: np.zeros(2) for block in blocks}
        for block, weight in zip(blocks, weights, strict=True):
            totals[block] += (float(_scores(weight).sum()), weight.product.size)
        outliers = {block: 0.0 for block in totals}
        for block, weight in zip(blocks, weights, strict=True):
            total, size = totals[block]
            above = _scores(weight) > self.factor * total / size
            outliers[block] += float(jnp.sum(above, dtype=np.float32)) / size
        ratio = np.array(list(outliers.values()))
        width = max(ratio.max() - ratio.min(), np.finfo(float).tiny)
        scaled = (ratio - ratio.min()) / width * 2 * self.spread
        kept = dict(zip(outliers, scaled - scaled.mean() + 1 - sparsity, strict=True))
        return exact(np.array([1 - kept[block] for block in blocks]), weights, sparsity)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """The share of each weight that one global ranking of scores removes.

    With `scores.trajectory(params, get_importance(state))` training itself says how
    much of each matrix matters; Adam's second moment is enough. The method then chooses
    inside the matrix.

    Attributes:
      scores: scores of these parameters, any criterion's.
    """

    scores: Scores
    needs_inputs = False

    def of(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The share of each weight that goes."""
        named = tree.named_leaves(self.scores)
        views = {weight.product.name: weight.product for weight in weights}
        missing = {p.leaf for p in views.values()} - {
            k for k, v in named.items() if not tree.is_excluded(v)
        }
        if missing:
            raise ValueError(
                "shares.Ranked needs scores of every weight to prune, but has none of "
                f"{sorted(missing)[:6]}; make them from these parameters, with the "
                "same prunable rule"
            )
        parts = {
            name: product.view.read(named[product.leaf])
            for name, product in views.items()
        }
        kept = masks.make(parts, sparsity, allocation="global")
        counts = tree.sparsity(kept).by_leaf
        return [Fraction(*counts[weight.product.name]) for weight in weights]


def exact(
    shares: np.ndarray, weights: Sequence[Weight], sparsity: float
) -> list[Fraction]:
    """Shares moved together, and cut at 0 and 1, until all weights lose what was asked.

    Args:
      shares: one a weight.
      weights: the weights.
      sparsity: the share of all weights that goes.

    Returns:
      Fractions whose counts are integers that add up to the nearest of sparsity x size.
    """
    sizes = np.array([weight.product.size for weight in weights], float)
    goal = allocate.in_all(sparsity, [weight.product.size for weight in weights])
    low, high = -1.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        removed = (np.clip(shares + middle, 0, 1) * sizes).sum()
        low, high = (middle, high) if removed < goal else (low, middle)
    ends = np.cumsum(np.clip(shares + high, 0, 1) * sizes)
    counts = np.diff(np.minimum(np.rint(ends), goal), prepend=0)
    counts[-1] += goal - counts.sum()
    return [
        Fraction(int(count), weight.product.size)
        for count, weight in zip(counts, weights, strict=True)
    ]


def block_of(product: LinearOp) -> tuple[str, int]:
    """The layer that a weight belongs to: what stands before the first number.

    Args:
      product: a product of the weight.

    Returns:
      A prefix and the layer's number; of a leaf that is stacked over layers its first
      name and its index, of a weight without a number its own name and -1.
    """
    if product.index:
        return product.leaf.split("/")[0], product.index[0]
    parts = product.leaf.split("/")
    before = list(itertools.takewhile(lambda part: not part.isdecimal(), parts))
    if len(before) < len(parts):
        return "/".join(before), int(parts[len(before)])
    if found := re.match(r"(.*?)_(\d+)(/|$)", product.leaf):  # Linen: Block_3/Dense_0
        return found[1], int(found[2])
    return product.leaf, -1


def _capped(
    raw: Sequence[float], weights: Sequence[Weight], sparsity: float
) -> np.ndarray:
    """Kept shares in proportion to `raw`, none above 1, that add up to what is kept."""
    sizes = np.array([weight.product.size for weight in weights], float)
    kept, full = np.array(raw), np.zeros(len(raw), bool)
    goal = (1 - allocate.checked(sparsity)) * sizes.sum()
    while True:
        rest = kept[~full] @ sizes[~full]
        scale = (goal - sizes[full].sum()) / rest if rest else 0.0
        over = ~full & (kept * scale > 1)
        if not over.any():
            return np.where(full, 1.0, kept * scale)
        full |= over


def _scores(weight: Weight) -> jax.Array:
    return _wanda(weight.matrix(), weight.mean_square)


@jax.jit
def _wanda(matrix: jax.Array, mean_square: jax.Array) -> jax.Array:
    return jax.vmap(activations.wanda)(matrix.astype(np.float32), mean_square)
