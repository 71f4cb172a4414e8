"""What the package must compute, slowly: float64 NumPy written from the formulas.

Nothing here imports jax or jaxprune. Leaves come as lists of arrays in tree order;
masks are bool, True where a weight is kept; a higher score is kept.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def coefficients(kind: str, count: int, parameter: float = 0.0) -> Array:
    """c(1), ..., c(count) of a weighting, up to a common factor.

    uniform: 1. power: i**p. exponential: decay**-i, here times decay**count so that
    nothing overflows.
    """
    i = np.arange(1, count + 1, dtype=np.float64)
    if kind == "uniform":
        return np.ones(count)
    if kind == "power":
        return i**parameter
    return parameter ** (count - i)


def gains(kind: str, count: int, parameter: float = 0.0) -> Array:
    """c(i) / (c(1) + ... + c(i)) for i = 1, ..., count."""
    if kind == "exponential":  # each prefix has a scale of its own
        i = np.arange(1, count + 1, dtype=np.float64)
        return (1 - parameter) / (1 - parameter**i)
    c = coefficients(kind, count, parameter)
    return c / np.cumsum(c)


def snapshots(steps: int, start: int = 0, every: int = 1) -> list[int]:
    """The 0-based updates at which a snapshot is taken."""
    return [t for t in range(steps) if t >= start and (t - start) % every == 0]


def average(
    values: Array,
    kind: str,
    parameter: float = 0.0,
    *,
    start: int = 0,
    every: int = 1,
    initial: Array | None = None,
) -> Array:
    """A_n = sum c(i) v_i / sum c(i) over the snapshots of `values` (steps, ...)."""
    values = np.asarray(values, np.float64)
    taken = values[snapshots(len(values), start, every)]
    if not len(taken):
        assert initial is not None
        return np.asarray(initial, np.float64)
    c = coefficients(kind, len(taken), parameter)
    return np.tensordot(c, taken, 1) / c.sum()


def mean_square(gradients: Array, kind: str = "uniform", p: float = 0.0) -> Array:
    """E[g^2] over the recorded gradients (steps, ...)."""
    return average(np.asarray(gradients, np.float64) ** 2, kind, p)


def mean_taylor(before: Array, gradients: Array) -> Array:
    """E[|w g|], w being the weight at which the gradient was taken."""
    product = np.asarray(before, np.float64) * np.asarray(gradients, np.float64)
    return average(np.abs(product), "uniform")


def magnitude(weight: Array) -> Array:
    """|w|."""
    return np.abs(np.asarray(weight, np.float64))


def obd(weight: Array, square: Array) -> Array:
    """w^2 E[g^2]: the diagonal of optimal brain damage."""
    return magnitude(weight) ** 2 * np.asarray(square, np.float64)


def preconditioned_magnitude(weight: Array, square: Array) -> Array:
    """|w| E[g^2]^(1/4)."""
    return magnitude(weight) * np.asarray(square, np.float64) ** 0.25


def removed_count(sparsity: float, size: int) -> int:
    """The integer nearest to sparsity x size."""
    return round(sparsity * size)


def keep_top(scores: Array, removed: int) -> Array:
    """Keeps all but the `removed` lowest; of equals the first positions are kept.

    A NaN ranks under everything, under -inf too.
    """
    flat = np.asarray(scores, np.float64).ravel()
    nan = np.isnan(flat)
    value = np.where(nan, 0.0, flat) + 0.0  # -0 and 0 are equal
    best_first = np.lexsort((np.arange(flat.size), -value, nan))
    kept = np.zeros(flat.size, bool)
    kept[best_first[: flat.size - removed]] = True
    return kept.reshape(np.shape(scores))


def keep_layer(leaves: Sequence[Array], sparsity: float) -> list[Array]:
    """Each leaf loses its own share."""
    return [keep_top(s, removed_count(sparsity, np.size(s))) for s in leaves]


def keep_global(leaves: Sequence[Array], sparsity: float) -> list[Array]:
    """One ranking over all leaves; ties go by (leaf, flat index)."""
    flat = [np.asarray(s, np.float64).ravel() for s in leaves]
    joined = np.concatenate(flat) if flat else np.zeros(0)
    kept = keep_top(joined, removed_count(sparsity, joined.size))
    ends = np.cumsum([f.size for f in flat])[:-1]
    return [
        k.reshape(np.shape(s))
        for k, s in zip(np.split(kept, ends), leaves, strict=True)
    ]


def keep_nm(scores: Array, n: int, m: int) -> Array:
    """The n best of each m consecutive inputs of an (in, out) matrix."""
    kept = np.zeros(scores.shape, bool)
    for column in range(scores.shape[1]):
        for first in range(0, scores.shape[0], m):
            group = scores[first : first + m, column]
            kept[first : first + m, column] = keep_top(group, m - n)
    return kept


def keep_blocks(scores: Array, rows: int, columns: int, sparsity: float) -> Array:
    """Whole blocks of an (in, out) matrix that they tile, ranked by their mean."""
    height, width = scores.shape[0] // rows, scores.shape[1] // columns
    means = np.asarray(scores, np.float64).reshape(height, rows, width, columns)
    means = means.mean((1, 3))
    kept = keep_top(means, removed_count(sparsity, means.size))
    return np.kron(kept, np.ones((rows, columns))).astype(bool)


def keep_channels(scores: Array, sparsity: float) -> Array:
    """Whole outputs (columns) of an (in, out) matrix, ranked by their mean."""
    means = np.asarray(scores, np.float64).mean(0)
    kept = keep_top(means, removed_count(sparsity, means.size))
    return np.broadcast_to(kept, scores.shape)


def keep_threshold(
    weight: Array, averaged: Array, rate: float, compare: str = "weight"
) -> Array:
    """The authors' rule: removed where |w| (or |A|) <= rate * std(A) of the leaf."""
    limit = rate * np.std(np.asarray(averaged, np.float64))
    return np.abs(weight if compare == "weight" else averaged) > limit
