"""What a job will need, roughly: bytes of memory, seconds, bytes of disk.

Products of matrices take most of the time, so their FLOPs are counted and divided by
the rate of one product that is timed here. `tests/lm/cli/test_plan.py` holds the memory
to half and twice of what a run takes; docs/results/records/plan_estimates.toml has the
times.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.recovery_settings import Recovery, Trained
from jaxprune.lm.jobs.settings import Calibration
from jaxprune.lm.measure import machine
from jaxprune.lm.models.decoder.model import LOGITS, keeps_products
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.recovery.sampled_tokens import OTHERS

_COMPILING = 15.0  # seconds of every job that runs the model
_NAMED = 9  # tokens that one token and its prediction add to a step's sample
_PROGRAMS = 150_000_000  # bytes of what is compiled
_REACHED = 0.5  # how much of a lone product's rate a model reaches
_STREAMED = 15e-9  # seconds a weight: read, ranked, written, summed up
_SIDE = 1024  # of the product that is timed


class Needs(NamedTuple):
    """What a job needs.

    Attributes:
      memory_bytes: peak of the process, or of a device.
      seconds: time that it takes on this device.
      disk_bytes: size of the result, and of the progress until then.
    """

    memory_bytes: int
    seconds: float
    disk_bytes: int


class Work(NamedTuple):
    """What a model and its texts make a job do.

    Attributes:
      matrices: name of a leaf to (matrices, in, out): experts are several.
      active: number of weights of the layers that a token is multiplied with.
      head: number of weights of the output head.
      parameters: number of parameters of the model.
      weights: bytes of the parameters in memory.
      tokens: number of tokens that are calibrated on.
      evaluated: number of tokens that are evaluated, at one stage.
      trained: number of tokens of all sequences that are trained on.
      width: number of a token's activations.
      wide: bytes of them.
      scores: bytes of a token's predictions.
    """

    matrices: dict[str, tuple[int, int, int]]
    active: float
    head: int
    parameters: int
    weights: int
    tokens: int
    evaluated: int
    trained: int
    width: int
    wide: int
    scores: int

    def forward(self, tokens: float, *, head: bool = True) -> float:
        """FLOPs of running the model on so many tokens."""
        # A multiplication and an addition for each weight.
        return 2.0 * tokens * (self.active + (self.head if head else 0))


def count_work(calibration: Calibration, model: LoadedModel, texts: JobTexts) -> Work:
    """What a job does, from the shapes alone."""
    config = model.config
    named = tree.named_leaves(model.params)
    matrices = {
        name: (math.prod(leaf.shape[:-2]), leaf.shape[-2], leaf.shape[-1])
        for name, leaf in named.items()
        if leaves.prunable(name, leaf)
    }
    # A token runs through a few of a layer's experts.
    used = config.experts_per_token / config.experts if config.experts else 1.0
    active = sum(
        math.prod(shape) * (used if shape[0] > 1 else 1.0)
        for shape in matrices.values()
    )
    # What the model writes itself is not there yet, but counts.
    drawn = 0 if texts.drawn is None else texts.drawn.tokens.size
    return Work(
        matrices=matrices,
        active=active,
        head=config.vocab_size * config.width,
        parameters=sum(leaf.size for leaf in named.values()),
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in named.values()),
        tokens=drawn + calibration.written_tokens,
        evaluated=sum(windows.tokens.size for windows in texts.windows.values()),
        trained=texts.trained_tokens,
        width=config.width,
        wide=config.width * np.dtype(config.dtype).itemsize,
        scores=4 * config.vocab_size,
    )


def writing_flops(calibration: Calibration, work: Work) -> float:
    """FLOPs of what the model writes for `--calibration self`."""
    # Token by token, which reaches less of the rate.
    return work.forward(2 * calibration.written_tokens)


def recovery_needs(
    recovery: Recovery, calibration: Calibration, work: Work
) -> tuple[float, int]:
    """FLOPs of the training afterwards, and bytes of what it holds."""
    if not recovery.recover_steps:
        return 0.0, 0
    # The dense model is in each step where its predictions are not kept.
    teacher = recovery.recover_by == "distillation" and not recovery.top
    size = _teacher_size(recovery, work)
    step = recovery.batch(calibration) * calibration.length  # tokens
    keeps = keeps_products(work.width, step)
    # Forward and back, forward again, and the teacher's forward.
    again = 0 if keeps else 1
    passes = recovery.steps * (3 + again + (size if teacher else 0))
    share = 1.0 if teacher else _logits_share(recovery, work, step)
    flops = work.forward(passes * step, head=False)
    flops += 2.0 * passes * step * work.head * share
    if recovery.top:
        followed = recovery.followed_tokens(work.trained, calibration.written_tokens)
        flops += work.forward(size * followed)
    memory = _trained_bytes(recovery.trained, work)
    # Logits, those without the likeliest, and the gradients of both.
    logits = int(share * step * work.scores)
    memory += 4 * min(logits, 4 * LOGITS)
    if keeps:
        outputs = sum(count * out for count, _, out in work.matrices.values())
        memory += step * outputs * work.wide // work.width
    held = int(size * work.weights)
    # A teacher whose predictions are kept is gone when the training begins.
    memory = memory + held if teacher else max(memory, held if recovery.top else 0)
    return flops, memory


def _logits_share(recovery: Recovery, work: Work, tokens: int) -> float:
    """The share of the vocabulary whose logits a step of so many tokens computes."""
    if recovery.trained == "all":
        return 1.0
    # A prediction's likeliest are mostly those of the tokens beside it.
    share = 4 * (OTHERS + _NAMED * tokens) / work.scores
    return share if share <= 0.5 else 1.0  # as `sampler_of` decides


def _teacher_size(recovery: Recovery, work: Work) -> float:
    """How many times the model's parameters the model has that is followed."""
    if recovery.recover_teacher is None:
        return 1.0
    tensors = open_directory(recovery.recover_teacher).tensors.values()
    return sum(math.prod(info.shape) for info in tensors) / work.parameters


def _trained_bytes(trained: Trained, work: Work) -> int:
    """Bytes of float32 weights, their gradients and AdamW's two moments."""
    matrices = sum(math.prod(shape) for shape in work.matrices.values())
    if trained == "all":
        return 16 * work.parameters
    if trained == "lora":  # the moments are of small factors
        return 8 * matrices
    return 16 * matrices if trained == "matrices" else 0


def statistics_flops(work: Work) -> float:
    """FLOPs of X^T X of each input; matrices that read the same one share it."""
    inputs = {
        (name.rsplit("/", 2)[0], name.rsplit("/", 2)[1] in ("out", "down"), rows)
        for name, (_, rows, _) in work.matrices.items()
    }
    # (rows, tokens) x (tokens, rows)
    return sum(2.0 * work.tokens * rows**2 for _, _, rows in inputs)


def largest_hessian(work: Work) -> int:
    """Bytes of the largest X^T X."""
    return 4 * max((rows**2 for _, rows, _ in work.matrices.values()), default=0)


def seconds(flops: float) -> float:
    """How long so many FLOPs of a model take on this device, with compilation."""
    return _COMPILING + flops / (_REACHED * rate())


def streaming_needs(source: CheckpointDir) -> Needs:
    """What magnitude needs that goes through the files tensor by tensor."""
    sizes = [math.prod(info.shape) for info in source.tensors.values()]
    # The tensor, its float32 scores, and what is written.
    peak = (machine.peak_memory() or 0) + 12 * max(sizes, default=0)
    return Needs(peak, 2 + _STREAMED * sum(sizes), source.size)


def base_memory() -> int:
    """Bytes of the process before it does anything, and of its programs."""
    return (machine.peak_memory() or 0) + _PROGRAMS


def rate() -> float:
    """FLOPs a second of one float32 product on this device, the best of five."""
    side = jnp.ones((_SIDE, _SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(side, side).block_until_ready()  # compiles
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(side, side).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * _SIDE**3 / min(times)
