"""What a job will need, roughly: bytes of memory, seconds, bytes of disk.

Products of matrices take most of the time, so their FLOPs are counted and divided by
the rate of one product that is timed here. `tests/lm/cli/test_plan.py` holds the memory
to half and twice of what a run takes, `docs/command.md` says how far the time was off.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.cli import models
from jaxprune.lm.cli.inputs import Ready
from jaxprune.lm.cli.job_options import JobOptions
from jaxprune.lm.measure import machine

_COMPILING = 15.0  # seconds of every job that runs the model
_PROGRAMS = 150_000_000  # bytes of what is compiled
_REACHED = 0.5  # how much of a lone product's rate a model reaches
_STREAMED = 15e-9  # seconds a weight: read, ranked, written, summed up
_SIDE = 1024  # of the product that is timed


class Needs(NamedTuple):
    """What a job needs.

    Attributes:
      memory_bytes: the peak of the process, or of a device.
      seconds: how long it takes on this device.
      disk_bytes: the result, and the progress until then.
    """

    memory_bytes: int
    seconds: float
    disk_bytes: int


class Work(NamedTuple):
    """What a model and its texts make a job do.

    Attributes:
      matrices: name of a leaf to (matrices, in, out): experts are several.
      active: weights of the layers that a token is multiplied with.
      head: weights of the output head.
      parameters: of the model.
      weights: bytes of the parameters in memory.
      tokens: that are calibrated on.
      evaluated: tokens that are evaluated, at one stage.
      wide: bytes of a token's activations.
      scores: bytes of a token's predictions.
    """

    matrices: dict[str, tuple[int, int, int]]
    active: float
    head: int
    parameters: int
    weights: int
    tokens: int
    evaluated: int
    wide: int
    scores: int

    def forward(self, tokens: int, *, head: bool = True) -> float:
        """FLOPs of running the model on so many tokens."""
        return 2.0 * tokens * (self.active + (self.head if head else 0))


def work(job: JobOptions, model: models.Model, ready: Ready) -> Work:
    """What a job does, from the shapes alone."""
    config = model.config
    named = tree.named_leaves(model.params)
    matrices = {
        name: (math.prod(leaf.shape[:-2]), leaf.shape[-2], leaf.shape[-1])
        for name, leaf in named.items()
        if leaves.prunable(name, leaf)
    }
    used = config.experts_per_token / config.experts if config.experts else 1.0
    active = sum(
        math.prod(shape) * (used if shape[0] > 1 else 1.0)
        for shape in matrices.values()
    )
    drawn = 0 if ready.drawn is None else ready.drawn.tokens.size
    return Work(
        matrices=matrices,
        active=active,
        head=config.vocab_size * config.width,
        parameters=sum(leaf.size for leaf in named.values()),
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in named.values()),
        tokens=drawn + job.own_sequences * job.length,
        evaluated=sum(seen.tokens.size for seen in ready.seen.values()),
        wide=config.width * np.dtype(config.dtype).itemsize,
        scores=4 * config.vocab_size,
    )


def recovery(job: JobOptions, does: Work) -> tuple[float, int]:
    """FLOPs of the training afterwards, and bytes of what it holds."""
    if (found := job.recovery) is None:
        return 0.0, 0
    teacher = found.kind == "distillation"
    passes = found.steps * (4 if teacher else 3)  # forward and back, and the teacher's
    moved = 16 * does.parameters  # float32: weights, gradients, two moments
    held = moved + (does.weights if teacher else 0)
    return does.forward(passes * job.batch * job.length), held


def statistics(does: Work) -> float:
    """FLOPs of X^T X of each input; matrices that read the same one share it."""
    inputs = {
        (name.rsplit("/", 2)[0], name.rsplit("/", 2)[1] in ("out", "down"), rows)
        for name, (_, rows, _) in does.matrices.items()
    }
    return sum(2.0 * does.tokens * rows**2 for _, _, rows in inputs)


def largest(does: Work) -> int:
    """Bytes of the largest X^T X."""
    return 4 * max((rows**2 for _, rows, _ in does.matrices.values()), default=0)


def seconds(flops: float) -> float:
    """How long so many FLOPs of a model take on this device, with compilation."""
    return _COMPILING + flops / (_REACHED * rate())


def streamed(source: CheckpointDir) -> Needs:
    """What magnitude needs that goes through the files tensor by tensor."""
    sizes = [math.prod(info.shape) for info in source.tensors.values()]
    # The tensor, its float32 scores, and what is written.
    peak = (machine.peak_memory() or 0) + 12 * max(sizes, default=0)
    return Needs(peak, 2 + _STREAMED * sum(sizes), source.size)


def base() -> int:
    """Bytes of the process before it does anything, and of its programs."""
    return (machine.peak_memory() or 0) + _PROGRAMS


def rate() -> float:
    """FLOPs a second of one float32 product on this device, the best of five."""
    side = jnp.ones((_SIDE, _SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(side, side).block_until_ready()
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        product(side, side).block_until_ready()
        taken.append(time.perf_counter() - start)
    return 2.0 * _SIDE**3 / min(taken)
