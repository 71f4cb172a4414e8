"""A batch is a pure function of (seed, step), so a resumed run sees the same data.

Windows follow nanoGPT: `context` tokens from a random offset are the inputs, the same
window one token later are the targets. The random numbers are raw 64-bit words of
Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by
(seed, step): NumPy promises that these never change between its versions.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Training batches: `batches(step)` depends on the seed and the step alone.

    Attributes:
      tokens: integers, shape (length,), length >= context + 1.
      batch_size: sequences in a batch, >= 1.
      context: tokens in a sequence, >= 1.
      seed: key of the random numbers, in [0, 2**64).

    Raises:
      ValueError: if there are too few tokens.

    Example:
      >>> batches = Batches(np.arange(100), batch_size=2, context=8, seed=0)
      >>> inputs, targets = batches(5)
      >>> inputs.shape, bool((targets == inputs + 1).all())
      ((2, 8), True)
    """

    tokens: np.ndarray
    batch_size: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        """Checks the length."""
        length, window = len(self.tokens), self.context + 1
        if not length >= window:
            raise ValueError(
                f"a batch needs at least context + 1 = {window} tokens, got {length}; "
                "give a longer text or a smaller context"
            )

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and targets of a step, both int32 (batch_size, context)."""
        philox = np.random.Philox(key=np.array([self.seed, step], np.uint64))
        words = philox.random_raw(self.batch_size)  # (batch,), uint64
        # The remainder favours low offsets by less than length / 2**64.
        offsets = words % np.uint64(len(self.tokens) - self.context)
        window = offsets.astype(np.int64)[:, None] + np.arange(self.context + 1)
        sequences = self.tokens[window].astype(np.int32)  # (batch, context + 1)
        return sequences[:, :-1], sequences[:, 1:]


def prefetch(
    make_batch: Callable[[int], T], start: int, stop: int, *, ahead: int = 2
) -> Iterator[T]:
    """Yields `make_batch(step)` for start <= step < stop, made in the background.

    One thread makes the next `ahead` batches, in order, while the caller uses this one.
    An exception of `make_batch` is raised at its step, after the batches before it. The
    thread ends with the iterator, or when that is closed or dropped.

    Example:
      >>> list(prefetch(lambda step: 10 * step, 3, 6))
      [30, 40, 50]
    """
    # One thread, so that batches are made in order.
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    steps = iter(range(start, stop))
    pending = deque(
        executor.submit(make_batch, step) for step in itertools.islice(steps, ahead)
    )
    try:
        while pending:
            batch = pending.popleft().result()
            for step in itertools.islice(steps, 1):
                pending.append(executor.submit(make_batch, step))
            yield batch
    finally:
        # Also when the iterator is dropped half way: the thread must not outlive the
        # run.
        executor.shutdown(cancel_futures=True)


def validation_batches(
    tokens: np.ndarray, batch_size: int, context: int, limit: int | None = None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cuts a validation set into windows that predict every token exactly once.

    Window k has the targets tokens[k * context + 1 : (k + 1) * context + 1]. The last
    window and the last batch are filled up with token 0 at weight 0, so that all
    batches have one shape and sum(weights * losses) / sum(weights) over all of them is
    the mean over tokens[1:].

    Args:
      tokens: token ids, integers, shape (length,), length >= 2.
      batch_size: number of windows in a batch, >= 1.
      context: number of tokens in a window, >= 1.
      limit: number of tokens to predict at most, the first ones, >= 1; None: all.

    Returns:
      A list of (inputs, targets, weights): int32, int32 and float32, each of shape
      (batch_size, context).

    Raises:
      ValueError: if there are fewer than 2 tokens.

    Example:
      >>> batches = validation_batches(np.arange(6), batch_size=2, context=2)
      >>> [targets.tolist() for _, targets, _ in batches]
      [[[1, 2], [3, 4]], [[5, 0], [0, 0]]]
      >>> sum(float(weights.sum()) for _, _, weights in batches)
      5.0
    """
    if not len(tokens) >= 2:
        raise ValueError(
            f"a validation set needs at least 2 tokens, got {len(tokens)}; give a "
            "longer text"
        )
    count = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
    size = batch_size * context
    padded = -(-count // size) * size  # rounded up to whole batches

    def cut(values: np.ndarray, dtype: type) -> np.ndarray:
        filled: np.ndarray = np.zeros(padded, dtype)
        filled[:count] = values
        return filled.reshape(-1, batch_size, context)  # (batches, batch, context)

    inputs = cut(tokens[:count], np.int32)
    targets = cut(tokens[1 : count + 1], np.int32)
    # Weight 0 behind the last token, so padding is counted by nobody.
    weights = cut(np.ones(count), np.float32)
    return list(zip(inputs, targets, weights, strict=True))
