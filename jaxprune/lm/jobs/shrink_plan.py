"""`jaxprune shrink --plan`: the smaller shape, and what the job would need."""

import statistics
from collections.abc import Iterable
from typing import Any, TypeAlias

from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import estimates, progress_dir, smaller_vocabulary
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.estimates import Needs
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.plan_words import say_needs, say_texts
from jaxprune.lm.jobs.shrink_rules import neurons_left
from jaxprune.lm.jobs.shrink_settings import Removal, ShrinkJob
from jaxprune.lm.jobs.width_rules import channels_left
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import unequal


def plan_shrink(
    job: ShrinkJob,
    source: CheckpointDir,
    model: LoadedModel,
    texts: JobTexts,
    console: Console,
) -> dict[str, Any]:
    """Says what `jaxprune shrink` would do.

    Args:
      job: what was asked for.
      source: directory of the model.
      model: model whose parameters are in their files.
      texts: what would be calibrated and evaluated on.
      console: where it is said.

    Returns:
      A JSON-able plan.
    """
    removal = job.removal
    shapes = _shapes(removal, model.config)
    if removal.hidden:
        width = model.config.width
        channels = channels_left(removal, source, model.config)
        shapes.insert(0, ("channels", width, channels))
    if removal.budget:  # what it is divided over is not known yet, all else is
        shapes = [shape for shape in shapes if shape[1] != shape[2]]
        division = "over layers, heads and neurons" if removal.search else "over both"
        console.say(
            f"{removal.budget:.1%} of the {removal.measure} would be left; what goes "
            f"is divided {division}{'' if removal.search else ' alike'} when it runs"
        )
    if removal.unequal:
        # With a budget no equal layers are shown: their sizes are not known yet.
        table = "" if removal.budget else ", which are the ones shown"
        console.say(
            "layers will keep different numbers of neurons and heads, with as many "
            f"parameters together as equal layers{table}"
        )
    if shapes:
        rows = [[what, f"{now:,}", f"{then:,}"] for what, now, then in shapes]
        console.say(columns([["", "now", "then"], *rows], right=True))
    say_texts(job, texts, console)
    work = estimates.count_work(job.calibration, model, texts)
    needs = _needs(job, source, work, _layers_left(removal, model.config))
    say_needs(needs, console)
    return {
        "plan": {what: [now, then] for what, now, then in shapes},
        "asked": removal.asked,
        **needs._asdict(),
    }


def _layers_left(removal: Removal, config: DecoderConfig) -> int:
    return removal.layers or config.layers - len({*removal.drop_layers})


Shape: TypeAlias = tuple[str, float, float]
"""What there are several of, and their number now and then."""


def _shapes(removal: Removal, config: DecoderConfig) -> list[Shape]:
    """What the model has, now and then; of layers that differ the mean."""
    sizes = [config.sizes(layer) for layer in range(config.layers)]
    widths = [size.mlp_width for size in sizes]
    # By the units that go: key heads, or query heads of one.
    heads = [n if kv_heads == 1 else kv_heads for n, kv_heads, _ in sizes]
    shapes: list[Shape] = [
        ("layers", config.layers, _layers_left(removal, config)),
        (
            "neurons a layer",
            _mean(widths),
            _mean(neurons_left(removal, width) for width in widths),
        ),
        (
            "heads a layer",
            _mean(heads),
            _mean(_without_share(n, removal.heads) if n > 1 else n for n in heads),
        ),
    ]
    if removal.vocab:
        shapes.insert(0, ("tokens", config.vocab_size, removal.vocab))
    if removal.query_heads:
        queries = config.heads // config.kv_heads
        name = "query heads of each key head"
        shapes.append((name, queries, _without_share(queries, removal.query_heads)))
    if config.experts:
        remaining = _without_share(config.experts, removal.experts)
        shapes.append(("experts a layer", config.experts, remaining))
    return shapes


def _mean(numbers: Iterable[int]) -> float:
    """The mean, to a tenth; an integer where it is one."""
    mean = round(statistics.fmean(numbers), 1)
    return int(mean) if mean.is_integer() else mean


def _without_share(units: int, share: float) -> int:
    return units - round(share * units)


def _needs(
    job: ShrinkJob, source: CheckpointDir, work: estimates.Work, layers: int
) -> Needs:
    """What `shrink` needs."""
    removal, calibration = job.removal, job.calibration
    training, memory = estimates.recovery_needs(job.recovery, calibration, work)
    once = work.forward(work.tokens)
    flops = work.forward((3 if job.recovery.recover_steps else 2) * work.evaluated)
    flops += estimates.writing_flops(calibration, work)
    total = len({name.split("/")[1] for name in work.matrices})
    if removal.vocab is not None:  # which tokens the dense model expects
        most = smaller_vocabulary.PREDICTED * calibration.length
        flops += work.forward(min(work.tokens, most))
    if removal.layers is not None:  # a search runs what is left without each layer
        flops += once * sum(range(layers + 1, total + 1)) / total
    if removal.narrowing.narrows and calibration.calibration:
        flops += (3 if removal.search else 1) * (
            once + estimates.statistics_flops(work)
        )
        # The inverse of each input's Hessian, and its updates.
        flops += sum(
            4.0 * rows**3 * (removal.search * 2 + 1)
            for name, (_, rows, _) in work.matrices.items()
            if name.rsplit("/", 2)[1] in ("out", "down")
        )
    if removal.hidden:  # scores, the model that is fitted to, and twice what is fitted
        flops += 4 * once + 2 * estimates.statistics_flops(work)
    if removal.search:  # three ways for heads, then one for each layer that may go
        flops += once * total
    disk = source.size
    disk += progress_dir.recovery_bytes(job, source, work.trained)
    if removal.unequal:
        flops += once * unequal.passes_of_judge(total)
        # All sizes of the matrices that units go out by, each about half as large.
        leaving = sum(
            rows * columns
            for name, (_, rows, columns) in work.matrices.items()
            if name.rsplit("/", 2)[1] in ("out", "down")
        )
        disk += int(4 * leaving * unequal.STEPS / 2)
    # The dense model twice and the small one: a prompt, then steps one by one, which
    # reach less of the rate.
    timed = 3 * job.evaluation.speed_rounds * work.forward(256 + 8 * 32)
    peak = _peak(job, work, memory)
    return Needs(int(peak), estimates.seconds(flops + timed + training), disk)


def _peak(job: ShrinkJob, work: estimates.Work, training: int) -> float:
    """Bytes at the greatest moment: measuring, other channels, narrowing, training."""
    removal, calibration = job.removal, job.calibration
    activations = 3 * work.tokens * work.wide if removal.narrowing.narrows else 0
    measured = 3 * calibration.batch * job.evaluation.context * work.scores
    return estimates.base_memory() + max(
        2 * work.weights + measured,
        # The dense model, the same in another basis, and what is fitted to it.
        3 * work.weights if removal.hidden else 0,
        2 * work.weights + activations + 3 * estimates.largest_hessian(work),
        # The dense model stays to the end: it is timed beside the small one.
        2 * work.weights + training,
    )
