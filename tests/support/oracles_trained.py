"""Post-training pruning, slowly: float64 NumPy written from the papers' formulas.

Nothing here imports jax or jaxprune. Kernels are (in, out); masks True where kept.
"""

import itertools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.support.oracles import keep_blocks, keep_nm, keep_top

Array = np.ndarray
Choose = Callable[[Array, int], Array]


def inputs(rows: int, size: int, seed: int = 0, rank: int | None = None) -> Array:
    """Correlated inputs of unlike sizes, (rows, size)."""
    rng = np.random.default_rng(seed)
    rank = max(size // 4, 1) if rank is None else rank
    mixed = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, size))
    noise = 0.3 * rng.normal(size=(rows, size))
    return (mixed / np.sqrt(rank) + noise) * np.exp(0.7 * rng.normal(size=size))


def problem(seed: int, size: int, outputs: int, rows: int) -> tuple[Array, Array]:
    """A float32 weight (size, outputs), and X^T X of so many rows of inputs."""
    weight = np.random.default_rng(seed).normal(size=(size, outputs))
    x = inputs(rows, size, seed)
    return weight.astype(np.float32), (x.T @ x).astype(np.float32)


def alps(weight: Array, hessian: Array, removed: int) -> Array:
    """ALPS without haste: 28 plain iterations by eigenvectors, then exact weights."""
    scale = np.sqrt(np.diag(hessian))[:, None]
    own, matrix = weight * scale, hessian / (scale * scale.T)
    values, vectors = np.linalg.eigh(matrix)
    copy, dual, last = own, np.zeros_like(own), 0.1
    for penalty in np.repeat(0.1 * 1.7 ** np.arange(7), 4):
        dual, last = dual * last / penalty, penalty
        shrunk = (penalty / (values + penalty))[:, None]
        free = own - vectors @ (shrunk * (vectors.T @ (own - copy + dual)))
        wanted = free + dual
        mask = keep_top(np.square(wanted), removed)
        copy = np.where(mask, wanted, 0)
        dual = wanted - copy
    return least_squares(own, matrix, mask) / scale


def damped(hessian: Array, damping: float) -> Array:
    """H + damping * mean(diag H) * I."""
    hessian = np.asarray(hessian, np.float64)
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def loss(weight: Array, pruned: Array, hessian: Array) -> float:
    """tr (W - V)^T H (W - V), output by output."""
    change = np.asarray(weight, np.float64) - np.asarray(pruned, np.float64)
    return sum(float(column @ hessian @ column) for column in change.T)


def sparsegpt(
    weight: Array,
    hessian: Array,
    damping: float,
    block: int,
    group: int,
    choose: Choose,
    bits: int = 0,
) -> tuple[Array, Array]:
    """Algorithm 1, each step with the inverse of what is left of the Hessian.

    `choose(scores, first)` gives the mask of the `group` inputs from `first` on, by
    w^2 / [H^-1]_00, the inverse being of the Hessian of the inputs j and after. Inputs
    after the block see its updates at once and not at its end, which is the same.
    With `bits` the kept weights of a block lie on levels, as GPTQ's: the scale of an
    output is of what its block keeps, or where that is not known yet of all of it.
    """
    weight = np.array(weight, np.float64)
    hessian = damped(hessian, damping)
    size = len(weight)
    left = [np.linalg.inv(hessian[j:, j:]) for j in range(size)]
    mask = np.ones(weight.shape, bool)
    for first in range(0, size, block):
        last = min(first + block, size)
        begun = weight[first:last].copy()
        for start in range(first, last, group):
            end = min(start + group, last)
            pivots = np.array([left[j][0, 0] for j in range(start, end)])
            scores = weight[start:end] ** 2 / pivots[:, None]
            mask[start:end] = choose(scores, start)
            if bits and start == first:
                early = mask[first:last] if group == block else 1
                scale = level_scale(begun * early, bits)
            for j in range(start, end):
                kept = on_levels(weight[j], scale, bits) if bits else weight[j]
                kept = np.where(mask[j], kept, 0.0)
                lost = weight[j] - kept
                weight[j:] -= np.outer(left[j][:, 0] / left[j][0, 0], lost)
                weight[j] = kept
    return weight, mask


def level_scale(weight: Array, bits: int) -> Array:
    """A scale an output, of eight significant bits, by the squared error.

    Of those where the last level is 100 %, 95 % ... 60 % of the largest weight.
    """
    best, least = None, None
    for share in np.arange(100, 59, -5) / 100:
        scale = np.float32(np.abs(weight).max(0) * share / (2 ** (bits - 1) - 1))
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
        scale = np.where(scale > 0, scale, 1.0)
        error = np.square(weight - on_levels(weight, scale, bits)).sum(0)
        if best is None:
            best, least = scale, error
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def on_levels(weight: Array, scale: Array, bits: int) -> Array:
    """The nearest whole number of scales, at most the last level either way."""
    most = 2 ** (bits - 1) - 1
    return np.clip(np.round(weight / scale), -most, most) * scale


def share(removed: int, first: int, last: int, parts: int) -> int:
    """What parts first to last lose: the difference of two totals rounded half up."""
    until = [(2 * removed * end + parts) // (2 * parts) for end in (first, last)]
    return until[1] - until[0]


def choose_unstructured(removed: int, size: int) -> Choose:
    """The block's share of the count, over all its weights."""

    def choose(scores: Array, first: int) -> Array:
        return keep_top(scores, share(removed, first, first + len(scores), size))

    return choose


def choose_per_output(removed: int, size: int) -> Choose:
    """Each output's share of the count, then the block's share of that."""

    def choose(scores: Array, first: int) -> Array:
        columns = []
        for i, column in enumerate(scores.T):
            own = removed // scores.shape[1] + (i < removed % scores.shape[1])
            out = share(own, first, first + len(scores), size)
            columns.append(keep_top(column, out))
        return np.stack(columns, 1)

    return choose


def choose_nm(n: int, m: int) -> Choose:
    """n of each m."""
    return lambda scores, first: keep_nm(scores, n, m)


def choose_tiles(removed: int, size: int, rows: int, columns: int) -> Choose:
    """The row of tiles' share of the count, by the mean of a tile."""

    def choose(scores: Array, first: int) -> Array:
        tile = first // rows
        out = share(removed, tile, tile + 1, size // rows)
        tiles = scores.shape[1] // columns
        return keep_blocks(scores, rows, columns, out / tiles)

    return choose


def surgeon(weight: Array, hessian: Array, q: int) -> tuple[Array, float]:
    """The best weights of one output without its q-th, and what that costs."""
    inverse = np.linalg.inv(hessian)
    after = weight - weight[q] / inverse[q, q] * inverse[:, q]
    return after, float(weight[q] ** 2 / inverse[q, q])


def least_squares(weight: Array, hessian: Array, mask: Array) -> Array:
    """The best weights on a support, by the normal equations of each output."""
    best = np.zeros(weight.shape)
    for i in range(weight.shape[1]):
        on = np.flatnonzero(mask[:, i])
        right = hessian[on] @ weight[:, i]
        best[on, i] = np.linalg.solve(hessian[np.ix_(on, on)], right)
    return best


def least_loss(weight: Array, hessian: Array, kept: int) -> float:
    """The least loss of one output over all supports of a size."""
    losses = []
    for support in itertools.combinations(range(len(weight)), kept):
        mask = np.zeros((len(weight), 1), bool)
        mask[list(support)] = True
        best = least_squares(weight[:, None], hessian, mask)
        losses.append(loss(weight[:, None], best, hessian))
    return min(losses)


def wanda(weight: Array, activations: Array) -> Array:
    """|W_ij| times the root of the mean square of input i."""
    scores = np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        scores[i, j] = abs(weight[i, j]) * np.sqrt(np.mean(activations[:, i] ** 2))
    return scores


def ria(weight: Array, activations: Array, power: float) -> Array:
    """(|W_ij| / sum of its input's + |W_ij| / sum of its output's) ||X_i||^a."""
    size, scores = np.abs(weight), np.zeros(weight.shape)
    for i, j in np.ndindex(*weight.shape):
        relative = size[i, j] / size[i].sum() + size[i, j] / size[:, j].sum()
        reach = np.sqrt(np.mean(activations[:, i] ** 2))
        scores[i, j] = relative * reach**power
    return scores
