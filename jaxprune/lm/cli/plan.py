"""`--plan`: what `prune` or `shrink` would do, and what it would need; nothing more.

All checks of the job are made, texts and headers are read, no weight is.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from jaxprune.arrays import tree
from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints import prune_magnitude
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.cli import estimates, inputs, models, parse, progress_dir
from jaxprune.lm.cli import prune_with_calibration as calibrated
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.estimates import Needs
from jaxprune.lm.cli.prune_options import Job, Meaning
from jaxprune.lm.cli.shrink_options import Job as ShrinkJob
from jaxprune.lm.cli.shrink_options import neurons_left
from jaxprune.typing import Pattern

_HEAVIER = {"alps": 2.5}  # than SparseGPT


def prune(job: Job, meaning: Meaning, console: Console) -> dict[str, Any]:
    """Says what `jaxprune prune` would do; JSON-able."""
    if job.streams:
        source, names, needs, ready = _streaming(job, meaning.pattern, console)
    else:
        run = calibrated.begin(job, meaning, console)
        source, ready = run.source, run.ready
        names = {
            theirs
            for name, leaf in tree.named_leaves(run.model.params).items()
            if run.prunable(name, leaf)
            for theirs in run.model.names[name].names
        }
        needs = _pruning(job, meaning, run)
    rows = _kinds(source, names)
    pattern = parse.pattern_word(meaning.pattern)
    asked = pattern if job.sparsity is None else f"sparsity {job.sparsity:g}, {pattern}"
    total = sum(row["weights"] for row in rows)
    console.say(_table(rows))
    console.say(
        f"\n{total:,} weights in {len(names)} matrices would be pruned by {job.method} "
        f"({asked}, allocation {job.allocation})"
    )
    _say_left(source, names, job.exclude, console)
    _say_texts(job, ready, console)
    _say_needs(needs, console)
    return {
        "plan": rows,
        "method": job.method,
        "pattern": pattern,
        "sparsity": meaning.sparsity,
        "allocation": job.allocation,
        **needs._asdict(),
    }


def shrink(
    job: ShrinkJob,
    source: CheckpointDir,
    model: models.Model,
    ready: inputs.Ready,
    console: Console,
) -> dict[str, Any]:
    """Says what `jaxprune shrink` would do; JSON-able."""
    config = model.config
    layers = job.layers or config.layers - len({*job.drop_layers})
    shapes = [
        ("layers", config.layers, layers),
        ("neurons a layer", config.mlp_width, neurons_left(job, config.mlp_width)),
        ("heads a layer", config.kv_heads, _left(config.kv_heads, job.heads)),
    ]
    if config.kv_heads == 1:
        shapes[2] = ("heads a layer", config.heads, _left(config.heads, job.heads))
    if job.query_heads:
        each = config.heads // config.kv_heads
        name = "query heads of each key head"
        shapes.append((name, each, _left(each, job.query_heads)))
    if config.experts:
        left = _left(config.experts, job.experts)
        shapes.append(("experts a layer", config.experts, left))
    if job.budget:  # what it is divided over is not known yet
        shapes = [] if job.search else [s for s in shapes if s[1] != s[2]]
        how = "over layers, heads and neurons" if job.search else "over both alike"
        console.say(
            f"{job.budget:.1%} of the {job.measure} would be left; what goes is "
            f"divided {how} when it runs"
        )
    if shapes:
        rows = [[what, f"{now:,}", f"{then:,}"] for what, now, then in shapes]
        console.say(columns([["", "now", "then"], *rows], right=True))
    _say_texts(job, ready, console)
    needs = _shrinking(job, source, estimates.work(job, model, ready), layers)
    _say_needs(needs, console)
    return {
        "plan": {what: [now, then] for what, now, then in shapes},
        "asked": job.asked,
        **needs._asdict(),
    }


def _left(units: int, share: float) -> int:
    return units - round(share * units)


def _streaming(
    job: Job, pattern: Pattern, console: Console
) -> tuple[CheckpointDir, set[str], Needs, inputs.Ready | None]:
    source = open_directory(job.model)
    parse.check_globs(job.exclude, source.tensors)
    progress_dir.check_room(job, source, 1)
    prune_magnitude.to_prune(source, pattern, parse.streamed(job.exclude))
    names = {
        name
        for name, info in source.tensors.items()
        if parse.why_kept(name, info, job.exclude) is None
    }
    needs = estimates.streamed(source)
    if not job.evaluate:
        return source, names, needs, None
    ready = inputs.prepare(job, source)
    does = estimates.work(job, models.find(job.model, job), ready)
    more = estimates.seconds(2 * does.forward(does.evaluated))
    peak = needs.memory_bytes + does.weights + job.batch * job.length * does.scores
    needs = needs._replace(seconds=needs.seconds + more, memory_bytes=peak)
    return source, names, needs, ready


def _pruning(job: Job, meaning: Meaning, run: Any) -> Needs:
    """What a pruning with calibration needs."""
    does = estimates.work(job, run.model, run.ready)
    dense = meaning.method.pruning.inputs == "dense"
    with_dense = meaning.method.correction > 0  # runs beside the pruned model
    again, held = estimates.recovery(job, does)
    stages = 3 if job.recovery else 2
    own = job.own_sequences * job.length
    flops = does.forward(stages * does.evaluated + 4 * own)
    pruning = does.forward(does.tokens, head=False) * (2 if dense or with_dense else 1)
    hessian = 0
    if "hessian" in meaning.method.observes:
        solving = sum(
            count * (3.0 * rows**3 + rows**2 * columns) * (2 if with_dense else 1)
            for count, rows, columns in does.matrices.values()
        )
        # The drift is one more product, not symmetric, and takes a solution of its own.
        pruning += estimates.statistics(does) * (3 if with_dense else 1) + solving
        hessian = estimates.largest(does) * (6 if dense else 5 if with_dense else 3)
    pruning *= _HEAVIER.get(job.method or "", 1.0)
    pruning += 3 * job.refine * does.forward(does.tokens, head=False)
    layer = does.weights // max(run.model.config.layers, 1)
    peak = estimates.base() + max(
        does.weights + 3 * job.batch * job.length * does.scores,
        3 * layer + (5 if with_dense else 3) * does.tokens * does.wide + hessian,
        does.weights + held,
    )
    copies = 3 if job.refine else 2
    return Needs(
        int(peak),
        estimates.seconds(flops + pruning + again),
        copies * run.source.size + progress_dir.states(job, run.source),
    )


def _shrinking(
    job: ShrinkJob, source: CheckpointDir, does: estimates.Work, layers: int
) -> Needs:
    """What `shrink` needs."""
    again, held = estimates.recovery(job, does)
    whole = len({name.split("/")[1] for name in does.matrices})
    once = does.forward(does.tokens)
    flops = does.forward((3 if job.recovery else 2) * does.evaluated)
    if job.layers is not None:
        flops += once * sum(range(layers + 1, whole + 1)) / whole
    if job.narrows and job.calibration:
        flops += (3 if job.search else 1) * (once + estimates.statistics(does))
        flops += sum(
            4.0 * rows**3 * (job.search * 2 + 1)
            for name, (_, rows, _) in does.matrices.items()
            if name.rsplit("/", 2)[1] in ("out", "down")
        )
    if job.search:  # three ways for heads, then one for each layer that may go
        flops += once * whole
    spoken = 2 * job.speed_rounds * does.forward(256 + 8 * 32)
    activations = 3 * does.tokens * does.wide if job.narrows else 0
    peak = estimates.base() + max(
        2 * does.weights + 3 * job.batch * job.length * does.scores,
        2 * does.weights + activations + 3 * estimates.largest(does),
        does.weights + held,
    )
    disk = source.size + progress_dir.states(job, source)
    return Needs(int(peak), estimates.seconds(flops + spoken + again), disk)


def _kinds(source: CheckpointDir, names: Iterable[str]) -> list[dict[str, Any]]:
    """The matrices, those of a name but for its numbers together, in their order."""
    found: dict[tuple[str, tuple[int, ...]], int] = Counter()
    wanted = {*names}
    for name, info in source.tensors.items():
        if name in wanted:
            found[re.sub(r"(?<=[./])\d+(?=[./])", "*", name), info.shape] += 1
    return [
        {
            "tensor": kind,
            "shape": list(shape),
            "count": count,
            "weights": count * math.prod(shape),
        }
        for (kind, shape), count in found.items()
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["tensor"],
            " x ".join(map(str, row["shape"])),
            str(row["count"]),
            f"{row['weights']:,}",
        ]
        for row in rows
    ]
    header = ["to be pruned", "shape", "count", "weights"]
    return columns([header, *cells], right=True)


def _say_left(
    source: CheckpointDir, names: Iterable[str], exclude: tuple[str, ...], say: Console
) -> None:
    pruned = {*names}
    reasons = Counter(
        parse.why_kept(name, info, exclude) or "not the matrix of a linear op"
        for name, info in source.tensors.items()
        if name not in pruned
    )
    if reasons:
        said = ", ".join(f"{count} ({why})" for why, count in reasons.items())
        say.say(f"left alone: {said}")


def _say_texts(job: Any, ready: inputs.Ready | None, console: Console) -> None:
    if ready is None:
        console.say("calibrated on nothing, evaluated on nothing")
        return
    counts = ready.drawn.counts if ready.drawn is not None else []
    parts = [
        f"{text.path.name} {count}"
        for text, count in zip(ready.calibration, counts, strict=True)
    ]
    if job.own_sequences:
        parts.append(f"what the model writes itself {job.own_sequences}")
    if parts:
        console.say(
            f"calibrated on sequences of {job.length} tokens: {', '.join(parts)}"
        )
    else:
        console.say("calibrated on nothing")
    seen = [f"{name} ({ready.roles[name]})" for name in ready.seen]
    console.say(f"evaluated on {', '.join(seen) or 'nothing'}")


def _say_needs(needs: Needs, console: Console) -> None:
    console.say(
        f"memory about {needs.memory_bytes / 1e9:.1f} GB, disk about "
        f"{needs.disk_bytes / 1e9:.2f} GB, time on this device about "
        f"{_duration(needs.seconds)}: a third to three times of it"
    )
    console.say("nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
