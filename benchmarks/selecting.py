"""An exact global threshold costs a few reads of the scores and no memory.

Compared with numpy.partition, which needs the scores joined into one array (timed with
the joining and without it), and with torch.nn.utils.prune.global_unstructured if torch
is installed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

import jaxprune as jp
from benchmarks import measure
from jaxprune.arrays.topk import thresholds


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the selection of the highest scores over many leaves.

    Attributes:
      size: scores in all.
      leaves: how many leaves they lie in.
      sparsity: the share under the threshold.
      repeats: timings of each candidate.
      torch: whether to time torch too, where it is installed; it is slow.
    """

    size: int = 100_000_000
    leaves: int = 200
    sparsity: float = 0.6
    repeats: int = 5
    torch: bool = True


def main(config: Config) -> None:
    """Prints one JSON line; seconds, bytes and nanoseconds a weight."""
    rows = config.size // config.leaves // 1000
    scores = [
        abs(jax.random.normal(jax.random.key(n), (rows, 1000)))
        for n in range(config.leaves)
    ]
    size = config.leaves * rows * 1000
    kept = size - round(config.sparsity * size)
    candidates: dict[str, Callable[[], Any]] = {
        "threshold": lambda: thresholds.cut_together(scores, kept),
        "masks": lambda: jp.masks.make(
            dict(enumerate(scores)), config.sparsity, allocation="global"
        ),
        "one_read": lambda: [_sum(leaf) for leaf in scores],
        "numpy_partition_joined": lambda: _partition(scores, size - kept),
    }
    joined = np.concatenate([np.ravel(leaf) for leaf in scores])
    # Joined once, outside of the clock: the search alone.
    candidates["numpy_partition"] = lambda: np.partition(joined, size - kept)
    times = measure.interleaved(candidates, config.repeats)
    if config.torch and (torch_prune := _torch(scores, config.sparsity)):
        # Once, for it is slow.
        times["torch_global_unstructured"] = [measure.seconds(torch_prune)]
    memory = {
        name: measure.peak_memory(candidates[name])["extra_bytes"]
        for name in ("threshold", "numpy_partition_joined")
    }
    seconds = {k: measure.median_and_spread(v) for k, v in times.items()}
    ours = seconds["threshold"]["median"]
    measure.report(
        "selecting",
        config=dataclasses.asdict(config),
        ratio={k: ours / v["median"] for k, v in seconds.items()},
        seconds=seconds,
        nanoseconds_a_weight=1e9 * ours / size,
        score_bytes=4 * size,
        extra_bytes=memory,
    )


@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    """One read of a leaf, as fast as XLA makes it."""
    return abs(leaf).max()


def _partition(scores: list[jax.Array], removed: int) -> np.ndarray:
    joined = np.concatenate([np.ravel(leaf) for leaf in scores])
    joined.partition(removed)  # in place
    return joined[removed]


def _torch(scores: list[jax.Array], sparsity: float) -> Callable[[], Any] | None:
    """Torch's own global pruning by magnitude of layers with these weights."""
    try:
        import torch
        from torch.nn.utils import prune
    except ImportError:
        return None
    torch.set_num_threads(2)  # as many as XLA uses on the machine of the tables

    def run() -> Any:
        layers = []
        for leaf in scores:
            layer = torch.nn.Linear(1, 1)
            layer.weight = torch.nn.Parameter(torch.from_numpy(np.array(leaf)))
            layers.append((layer, "weight"))
        prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
        return None

    return run


if __name__ == "__main__":
    main(tyro.cli(Config))
