"""Sparsity patterns: which weights are pruned together, and how many of a group.

A pattern pools the scores of a leaf into scores of units and spreads the mask of the
units back over the leaf. Groups and blocks are laid on the (batch, in, out) view of
`axes`; n:m means n KEPT of each m consecutive weights along the input axis.
"""

import dataclasses
import numbers
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxprune.arrays import exact_sum
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import chosen
from jaxprune.arrays.placement import divisible
from jaxprune.arrays.topk import float_order
from jaxprune.arrays.topk.float_order import Line
from jaxprune.typing import Pattern

__all__ = ["NM", "Block", "Channel", "PerOutput", "Unstructured", "parse"]


def __dir__() -> list[str]:
    return __all__


# Groups of up to so many are ranked by comparing, which takes m^2 operations.
_COMPARED = 64


def _ranks(scores: jax.Array) -> Float32[Array, "..."]:
    """The rank of each score along axis 2, from 0 for the highest; ties by position."""
    falling = ~float_order.of(scores, Line.of(scores.dtype).signed)
    # The place of each in the sorted order: argsort's inverse is an argsort.
    rank = jnp.argsort(jnp.argsort(falling, 2, stable=True), 2)
    return rank.astype(jnp.float32)


def _total(scores: jax.Array, axis: int) -> jax.Array:
    """The exact sum; of float64 in a unit of its own, so that its range is kept."""
    if scores.dtype != np.float64:
        return exact_sum.total(scores, axis)
    size = jnp.where(jnp.isfinite(scores), jnp.abs(scores), 0)
    largest = jnp.max(size, initial=0)
    # By its bits: the backends' exp2 may be a digit off, and equal sums would not tie.
    normal = jnp.maximum(largest, jnp.finfo(np.float64).tiny)
    bits = jax.lax.bitcast_convert_type(normal, np.int64)
    unit = jax.lax.bitcast_convert_type(bits & ~np.int64(2**52 - 1), np.float64)
    return exact_sum.total(scores / unit, axis).astype(np.float64) * unit


class _Free:
    """A pattern that leaves the sparsity free and takes any shape."""

    sparsity: float | None = None

    def problem(self, shape: tuple[int, ...], axes: Axes) -> str | None:
        """Any shape will do."""
        return None


@dataclasses.dataclass(frozen=True)
class Unstructured(_Free):
    """Every weight is its own unit.

    Example:
      >>> import jaxprune as jp
      >>> jp.patterns.Unstructured()
      Unstructured()
    """

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float[Array, "*shape"]:
        """The scores themselves."""
        return scores

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """The mask itself."""
        return kept


@dataclasses.dataclass(frozen=True)
class PerOutput(_Free):
    """Every weight is its own unit, and each output loses the same share of its inputs.

    Each output ranks its own inputs, as Wanda does; ties keep the first input. The
    whole loses exactly the count asked for, so outputs differ by at most one weight;
    the first outputs lose it.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> scores = {"w": jnp.array([[4.0, 2.0], [3.0, 1.0]])}
      >>> jp.masks.make(scores, 0.5, pattern=jp.patterns.PerOutput())["w"].tolist()
      [[True, True], [False, False]]

    Reference:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
      2023, arXiv 2306.11695, section 3.
    """

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float32[Array, "batch out in"]:
        """Minus the rank inside the output as a share of the inputs, (batch, out, in).

        One cut then serves all outputs. Batch and outputs are in reversed order: among
        weights of equal rank the cut keeps the first, here those of the last outputs,
        so it is the first outputs that lose one weight more.
        """
        matrix = axes.matrix(scores)  # (batch, in, out)
        matrix = divisible(matrix, 1, max(matrix.shape[1], 1), 1)
        reversed_rows = jnp.flip(jnp.swapaxes(matrix, 1, 2), (0, 1))  # (batch, out, in)
        # As a share of the inputs, since leaves of different sizes share one cut.
        return -_ranks(reversed_rows) / max(reversed_rows.shape[2], 1)

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """The mask, turned back."""
        return axes.restore(jnp.swapaxes(jnp.flip(kept, (0, 1)), 1, 2), shape)


@dataclasses.dataclass(frozen=True)
class NM:
    """Exactly n kept of each m consecutive weights along the input axis.

    The pattern fixes the sparsity, 1 - n / m; ties keep the first of the group.

    Attributes:
      n: weights kept in a group.
      m: weights in a group.

    Raises:
      ValueError: not integers with 0 < n < m.

    Example:
      >>> import jaxprune as jp
      >>> jp.patterns.NM(2, 4).sparsity
      0.5

    Reference:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuses groups that keep nothing or everything."""
        if not (
            all(isinstance(x, numbers.Integral) for x in (self.n, self.m))
            and 0 < self.n < self.m
        ):
            raise ValueError(
                f"NM(n, m) needs integers 0 < n < m, got NM({self.n}, {self.m})"
            )

    @property
    def sparsity(self) -> float:
        """The share removed, 1 - n / m."""
        return (self.m - self.n) / self.m

    def problem(self, shape: tuple[int, ...], axes: Axes) -> str | None:
        """The input axes must divide into groups."""
        inputs = axes.order(len(shape))[-len(axes.inputs + axes.outputs) :]
        size = 1
        for axis in inputs[: len(axes.inputs)]:
            size *= shape[axis]
        if size % self.m:
            return (
                f"NM({self.n}, {self.m}) needs the input axis to be divisible by "
                f"{self.m}, got {size}"
            )
        return None

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float[Array, "*shape"]:
        """Minus the rank inside the group, so that one cut serves all groups."""
        matrix = divisible(axes.matrix(scores), 1, self.m, 1)
        batch, inputs, outputs = matrix.shape
        # (batch, groups, m, out)
        groups = matrix.reshape(batch, inputs // self.m, self.m, outputs)
        rank = _ranks(groups) if self.m > _COMPARED else self._compared(groups)
        return axes.restore(-rank.reshape(matrix.shape), scores.shape)

    def _compared(
        self, groups: Float[Array, "batch groups m out"]
    ) -> Float[Array, "batch groups m out"]:
        """Ranks without a sort: each weight is compared with each of its group."""
        place = jnp.arange(self.m).reshape(1, 1, self.m, 1)
        rank = jnp.zeros(groups.shape, jnp.float16)
        # As integers: a CPU takes subnormal floats for zeros when it compares them.
        ranks = float_order.of(groups, Line.of(groups.dtype).signed)
        for other in range(self.m):
            rival = ranks[:, :, other : other + 1]
            before = (rival > ranks) | ((rival == ranks) & (other < place))
            rank = rank + before.astype(rank.dtype)
        return rank

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """The mask itself."""
        return kept


@dataclasses.dataclass(frozen=True)
class Block(_Free):
    """Tiles of rows x columns (input x output) are pruned as a whole.

    A tile's score is the mean of its weights' scores; a tile at the edge may be smaller
    and counts as one tile. The sparsity is met in tiles.

    Attributes:
      rows: weights of a tile along the input.
      columns: weights of a tile along the output.

    Raises:
      ValueError: a side is no integer or under 1.

    Example:
      >>> import jaxprune as jp
      >>> jp.patterns.Block(16, 16)
      Block(rows=16, columns=16)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Refuses empty tiles."""
        if not all(
            isinstance(x, numbers.Integral) and int(x) >= 1
            for x in (self.rows, self.columns)
        ):
            raise ValueError(f"Block needs integer sides of at least 1, got {self}")

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float[Array, "batch rows columns"]:
        """The mean score of each tile, (batch, in tiles, out tiles)."""
        matrix = axes.matrix(scores)  # (batch, in, out)
        return self._tiled(matrix) / self._sizes(*matrix.shape[1:])

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """Each tile's bit on all of its weights."""
        # The last tiles may reach over the edge: they are cut at the end.
        _, inputs, outputs = axes.matrix_shape(shape)
        batch, high, wide = kept.shape
        # One axis after the other, not `jnp.repeat`: inside an Explicit mesh it asks
        # for the sharding of its result.
        tall = jnp.broadcast_to(kept[:, :, None], (batch, high, self.rows, wide))
        tall = tall.reshape(batch, high * self.rows, wide)  # (batch, in, out tiles)
        mask = jnp.broadcast_to(tall[..., None], (*tall.shape, self.columns))
        mask = mask.reshape(*tall.shape[:2], wide * self.columns)  # (batch, in, out)
        return axes.restore(mask[:, :inputs, :outputs], shape)

    def _sizes(
        self, inputs: int, outputs: int
    ) -> Float32[np.ndarray, "1 rows columns"]:
        """How many weights each tile has; the last ones may be smaller."""
        high = np.minimum(self.rows, inputs - np.arange(0, inputs, self.rows))
        wide = np.minimum(self.columns, outputs - np.arange(0, outputs, self.columns))
        return (high[:, None] * wide).astype(np.float32)[None]

    def _tiled(self, matrix: Float[Array, "batch in out"]) -> Float[Array, "batch _ _"]:
        """Sums over tiles, one axis after the other: shardings survive that."""
        batch, inputs, outputs = matrix.shape
        rows, columns = -inputs % self.rows, -outputs % self.columns
        matrix = divisible(matrix, 1, self.rows, self.columns)
        padded = jnp.pad(matrix, ((0, 0), (0, rows), (0, columns)))
        high, wide = inputs + rows, outputs + columns
        # (batch, in tiles, rows, out)
        tall = padded.reshape(batch, high // self.rows, self.rows, wide)
        tall = _total(tall, 2).squeeze(2)  # (batch, in tiles, out)
        tiles = tall.reshape(
            batch, high // self.rows, wide // self.columns, self.columns
        )
        return _total(tiles, 3).squeeze(3)  # (batch, in tiles, out tiles)


@dataclasses.dataclass(frozen=True)
class Channel(_Free):
    """Whole output channels are pruned together.

    A channel's score is the mean of its weights' scores. The sparsity is met in
    channels; stacked matrices have channels of their own.

    Example:
      >>> import jaxprune as jp
      >>> jp.patterns.Channel()
      Channel()
    """

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float[Array, "batch 1 out"]:
        """The mean score of each output channel, (batch, 1, out)."""
        matrix = axes.matrix(scores)  # (batch, in, out)
        if not matrix.size:  # a channel without weights is none to remove
            return matrix
        return _total(matrix, 1) / matrix.shape[1]

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """Each channel's bit on all of its weights."""
        return axes.restore(jnp.broadcast_to(kept, axes.matrix_shape(shape)), shape)


def parse(pattern: Pattern | str) -> Pattern:
    """A pattern from its name, or the pattern itself.

    Args:
      pattern: "unstructured", "per-output", "channel", "n:m" as in "2:4", "RxC" as in
        "16x16" (inputs x outputs), or a pattern.

    Returns:
      The pattern.

    Raises:
      ValueError: the name is none of these.
      TypeError: it is neither a name nor a pattern.

    Example:
      >>> import jaxprune as jp
      >>> jp.patterns.parse("2:4"), jp.patterns.parse("16x16")
      (NM(n=2, m=4), Block(rows=16, columns=16))
    """
    sizes = re.compile(r"(\d+)([:x])(\d+)")
    if isinstance(pattern, str) and (match := sizes.fullmatch(pattern)):
        pattern_class = NM if match[2] == ":" else Block
        return pattern_class(int(match[1]), int(match[3]))
    choices = (
        "n:m as in '2:4', a block as in '16x16', or a value such as "
        "jp.patterns.NM(2, 4)"
    )
    return chosen("pattern", pattern, _NAMED, "units", choices)


_NAMED: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "per-output": PerOutput(),
    "channel": Channel(),
}
