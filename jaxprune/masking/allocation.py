"""How one sparsity is shared out among the weights of a model: the rules.

Each weight gets a sparsity of its own, and all together have the one asked for. A rule
sees plain data of each weight (name, shape, values, statistics of its input).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import counting, placement, processes
from jaxprune.arrays.messages import chosen, listed
from jaxprune.arrays.rules import is_between
from jaxprune.arrays.topk import thresholds
from jaxprune.masking.checks import floating_scores
from jaxprune.masking.shares import capped_shares, exact_shares
from jaxprune.scores import from_activations
from jaxprune.typing import Scores

__all__ = [
    "ERK",
    "OWL",
    "Global",
    "Layer",
    "PerMatrix",
    "Ranked",
    "Rule",
    "Weight",
    "parse",
]


def __dir__() -> list[str]:
    return __all__


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """What a rule may know of a weight.

    Attributes:
      name: name of the weight.
      leaf: path name of its leaf, of which it may be a part.
      index: place in a leaf that stacks weights; empty for a leaf by itself.
      shape: shape (batch, in, out).
      view: function of an array shaped like the leaf to the weight's part of it,
        (batch, in, out).
      read: function that gives the weight itself as (batch, in, out).
      mean_square: mean squares of its input's features (batch, in), from the dense
        model; None where the rule does not ask for them.
    """

    name: str
    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    view: Callable[[jax.Array], jax.Array]
    read: Callable[[], jax.Array]
    mean_square: jax.Array | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Rule(Protocol):
    """How a sparsity is shared out."""

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads the mean squares of the dense model's inputs."""

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The same sparsity for every weight, the layer of a network: "layer".

    Example:
      >>> import jaxprune as jp
      >>> jp.allocation.Layer()
      Layer()
    """

    needs_inputs = False

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight."""
        return [Fraction(sparsity)] * len(weights)


@dataclasses.dataclass(frozen=True)
class PerMatrix(Layer):
    """The same sparsity for every matrix of a stack, each ranked by itself: "matrix".

    For leaves that a scan stacks over layers, (layers, in, out), of which "layer" makes
    one ranking, so that a layer of small weights may lose them all. `prune_trained`
    always goes matrix by matrix.
    """


@dataclasses.dataclass(frozen=True)
class Global:
    """One ranking over all weights: "global".

    `masks.make` and `prune` rank the scores that they are given. `prune_trained` ranks
    magnitudes, which it reads all at once, and its method then chooses inside each
    weight; `Ranked` takes other scores.
    """

    needs_inputs = False

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight, from one ranking of magnitudes."""
        return _ranked(weights, [jnp.abs(w.read()) for w in weights], sparsity)


@dataclasses.dataclass(frozen=True)
class ERK:
    """Erdos-Renyi: the kept share is in proportion to (in + out) / (in out).

    Weights that would keep more than all keep all, and the rest shares what is left.
    Every leaf counts as its matrix: the window of a convolution is part of its inputs,
    where the paper's kernel form adds the window's sides as terms of their own.

    Reference:
      Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets
      Winners", 2020, arXiv 1911.11134, section 3.
    """

    needs_inputs = False

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight."""
        sizes = [weight.size for weight in weights]
        density = [
            (i + o) / max(i * o, 1) for *_, i, o in (weight.shape for weight in weights)
        ]
        return exact_shares(
            1 - capped_shares(density, sizes, sparsity), sizes, sparsity
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

    Raises:
      ValueError: not 0 <= spread < 1, or the factor is not over 0.

    Reference:
      Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
      Pruning LLMs to High Sparsity", 2023, arXiv 2310.05175, equation 2. Here the
      shares are shifted together so that the sparsity of all weights is exact, where
      layers differ in size.
    """

    spread: float = 0.08
    factor: float = 5.0
    needs_inputs = True

    def __post_init__(self) -> None:
        """Refuses what would turn the rule round, or mean nothing."""
        if not (
            all(is_between(x, 0, math.inf) for x in (self.spread, self.factor))
            and (self.spread < 1 and 0 < self.factor < math.inf)
        ):
            raise ValueError(
                f"OWL needs 0 <= spread < 1 and a factor over 0, got {self}; the "
                "paper's are 0.08 and 5"
            )

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight."""
        layers = _layers(weights)
        totals = {layer: np.zeros(2) for layer in layers}  # sum of scores, size
        for layer, weight in zip(layers, weights, strict=True):
            totals[layer] += (float(_scores(weight).sum()), weight.size)
        outliers = {layer: 0.0 for layer in totals}
        # Scores are made twice: those of all weights may not fit in memory.
        for layer, weight in zip(layers, weights, strict=True):
            total, size = totals[layer][0], max(totals[layer][1], 1)
            above = _scores(weight) > self.factor * total / size
            outliers[layer] += float(jnp.sum(above, dtype=np.float32)) / size
        # The layers' shares of outliers, mapped to [-spread, spread] around their mean.
        ratio = np.array(list(outliers.values()))  # (layers,)
        width = max(ratio.max() - ratio.min(), np.finfo(float).tiny)
        scaled = (ratio - ratio.min()) / width * 2 * self.spread
        kept = dict(zip(outliers, scaled - scaled.mean() + 1 - sparsity, strict=True))
        pruned = np.array([1 - kept[layer] for layer in layers])  # (weights,)
        return exact_shares(pruned, [weight.size for weight in weights], sparsity)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """The sparsity that one global ranking of given scores leaves each weight with.

    With `scores.preconditioned_magnitude(params, state)` training itself says how much
    of each matrix matters; Adam's second moment is enough. What is pruned inside a
    matrix is chosen by the method of `prune_trained`, or by the scores of `prune`.

    Attributes:
      scores: scores of these parameters, any criterion's.
    """

    scores: Scores = dataclasses.field(repr=False)
    needs_inputs = False

    def sparsities(self, weights: Sequence[Weight], sparsity: float) -> list[Fraction]:
        """The sparsity of each weight.

        Args:
          weights: the weights to prune; each one's leaf has scores.
          sparsity: share to remove of all of them.

        Returns:
          A fraction for each weight, whose count is an integer.

        Raises:
          ValueError: a weight has no scores, or they are NaN, traced or of another
            shape.
          TypeError: they are not floating.
        """
        named = floating_scores(self.scores)
        if missing := sorted({weight.leaf for weight in weights} - named.keys()):
            raise ValueError(
                "allocation.Ranked needs scores of every weight to prune, but has none "
                f"of {listed(missing)}; make them from these parameters, with the same "
                "prunable rule"
            )
        misshapen = [
            weight.name
            for weight in weights
            if jax.eval_shape(weight.view, named[weight.leaf]).shape != weight.shape
        ]
        if misshapen:
            raise ValueError(
                "allocation.Ranked needs scores of the weights' shapes, but those of "
                f"{listed(misshapen)} have others; make them from these parameters"
            )
        if any(isinstance(named[weight.leaf], jax.core.Tracer) for weight in weights):
            raise ValueError(
                "allocation.Ranked counts what its scores prune, so they must have "
                "values, but they are traced; make them outside of jit"
            )
        leaves = [named[weight.leaf] for weight in weights]
        # The counts are Python integers, so they are computed now, in `jit` too.
        with placement.at_once(leaves):
            parts = [w.view(leaf) for w, leaf in zip(weights, leaves, strict=True)]
            return _ranked(weights, parts, sparsity)


Name: TypeAlias = Literal["layer", "global", "erk", "owl", "matrix"]
"""The names of the rules."""

RULES: dict[str, Rule] = {
    "layer": Layer(),
    "global": Global(),
    "erk": ERK(),
    "owl": OWL(),
    "matrix": PerMatrix(),
}
"""Each rule with its usual settings, by its name."""


def parse(allocation: Rule | str) -> Rule:
    """A rule from its name, or the rule itself.

    Args:
      allocation: a name in `RULES`, or a rule.

    Returns:
      The rule.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is neither a name nor a rule.

    Example:
      >>> import jaxprune as jp
      >>> jp.allocation.parse("owl")
      OWL(spread=0.08, factor=5.0)
    """
    choices = "a value such as jp.allocation.ERK(), or {glob: share}"
    return chosen("allocation", allocation, RULES, "sparsities", choices)


def _layers(weights: Sequence[Weight]) -> list[tuple[str, int]]:
    """The layer (prefix, number) of each weight: the first number that tells any apart.

    A number that is the same in all weights with this prefix numbers no layers, such as
    the first of Linen's "Encoder_0/Block_3". Of a leaf that is used index by index the
    index is the layer, unless its name has the number of one: numbers with weights
    beside it that have no index, as "blocks/3/up" beside "blocks/3/qkv" of three parts.
    """
    numbers_by_weight = [_numbers(weight) for weight in weights]
    numbers_by_prefix: dict[str, set[int]] = {}
    for prefix, number in itertools.chain(*numbers_by_weight):
        numbers_by_prefix.setdefault(prefix, set()).add(number)
    pairs = list(zip(weights, numbers_by_weight, strict=True))
    # Prefixes whose numbers have weights that are no part of a stack.
    single = {prefix for w, places in pairs if not w.index for prefix, _ in places}

    def layer(weight: Weight, places: list[tuple[str, int]]) -> tuple[str, int]:
        last = places[0]
        if weight.index:
            last = (weight.leaf.removeprefix("params/").split("/")[0], weight.index[0])
            places = [place for place in places if place[0] in single]
        return next(
            (place for place in places if len(numbers_by_prefix[place[0]]) > 1), last
        )

    return [layer(*pair) for pair in pairs]


def _numbers(weight: Weight) -> list[tuple[str, int]]:
    """Each number in a weight's name, with what stands before it.

    Of a weight without a number it is its own name and -1.
    """
    matches = re.finditer(r"(?:^|[/_])(\d+)(?=/|$)", weight.leaf)
    places = [(weight.leaf[: match.start()], int(match[1])) for match in matches]
    return places or [(weight.leaf, -1)]


def _ranked(
    weights: Sequence[Weight], scores: Sequence[jax.Array], sparsity: float
) -> list[Fraction]:
    """The share of each weight that one ranking of all scores prunes."""
    # Ties keep the first by name.
    order = sorted(range(len(weights)), key=lambda i: weights[i].name)
    size = sum(score.size for score in scores)
    ordered = [scores[i] for i in order]
    cuts = thresholds.cut_together(ordered, size - round(sparsity * size))
    kept = processes.fetch(list(map(_kept, ordered, cuts)))
    kept_counts = {
        i: counting.whole(number) for i, number in zip(order, kept, strict=True)
    }
    return [
        Fraction(w.size - kept_counts[i], max(w.size, 1)) for i, w in enumerate(weights)
    ]


@jax.jit
def _kept(scores: jax.Array, cut: thresholds.Cut) -> jax.Array:
    return counting.parts(thresholds.above_cut(scores, cut), scores.size)


def _scores(weight: Weight) -> jax.Array:
    if weight.mean_square is None:
        raise ValueError(
            f"OWL reads the mean squares of the inputs of '{weight.name}', which are "
            "not there; give Weight(mean_square=...)"
        )
    return _wanda(weight.read(), weight.mean_square)


@jax.jit
def _wanda(matrix: jax.Array, mean_square: jax.Array) -> jax.Array:
    return jax.vmap(from_activations.wanda)(matrix.astype(np.float32), mean_square)
