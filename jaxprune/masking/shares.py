"""Shares of many weights that together prune exactly what one sparsity says."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def exact_shares(
    shares: np.ndarray, sizes: Sequence[int], sparsity: float
) -> list[Fraction]:
    """Shifts all pruned shares by one number so that the total is the one asked for.

    Args:
      shares: pruned shares (weights,), any floats.
      sizes: numbers of elements of the weights.
      sparsity: share to prune of all weights together.

    Returns:
      The shifted shares, clipped to [0, 1]. Each is a fraction with an integer count of
      pruned elements; the counts add up to the integer nearest to sparsity x size.
    """
    lengths = np.array(sizes, float)  # (weights,)
    goal = round(sparsity * sum(sizes))
    # Bisection: what is pruned rises with the common shift of all shares.
    low, high = -1.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        # Not `np.clip`, whose Python takes as long as all else: a schedule asks for
        # the shares of each of its events.
        clipped = np.minimum(np.maximum(shares + middle, 0), 1)
        pruned = np.add.reduce(clipped * lengths)
        low, high = (middle, high) if pruned < goal else (low, middle)
    # Rounded are the ends of the running sum, so that the counts add up to the goal.
    ends = np.rint(np.cumsum(np.clip(shares + high, 0, 1) * lengths))
    ends[-1] = goal
    counts: list[float] = []
    total = 0.0
    for end, length in zip(np.minimum(ends, goal), lengths, strict=True):
        # Two ends on halves may be rounded apart, by one more than the size.
        counts.append(min(end - total, length))
        total += counts[-1]
    return [
        Fraction(int(count), max(size, 1))
        for count, size in zip(counts, sizes, strict=True)
    ]


def capped_shares(
    density: Sequence[float], sizes: Sequence[int], sparsity: float
) -> np.ndarray:
    """Kept shares in proportion to densities, at most 1, that add up to the goal.

    Args:
      density: share that each weight would keep, up to one common factor.
      sizes: numbers of elements of the weights.
      sparsity: share to prune of all weights together.

    Returns:
      The kept shares (weights,).
    """
    lengths = np.array(sizes, float)  # (weights,)
    kept, full = np.array(density), np.zeros(len(density), bool)
    goal = (1 - sparsity) * lengths.sum()
    while True:
        scalable = kept[~full] @ lengths[~full]
        scale = (goal - lengths[full].sum()) / scalable if scalable else 0.0
        over = ~full & (kept * scale > 1)
        if not over.any():
            return np.where(full, 1.0, kept * scale)
        # These keep all, and what they cannot take goes to the others: once more.
        full |= over
