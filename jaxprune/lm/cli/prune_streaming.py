"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` the model is loaded too, before and after, to measure it. OUT appears
when all of that is done.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.prune_magnitude import prune_directory
from jaxprune.lm.cli import inputs, models, parse, progress_dir, provenance
from jaxprune.lm.cli.console import Console, byte_progress
from jaxprune.lm.cli.eval import measure
from jaxprune.lm.cli.prune_options import Job, Meaning
from jaxprune.lm.measure.machine import Costs


def prune(
    job: Job, meaning: Meaning, console: Console, arguments: list[str]
) -> dict[str, Any]:
    """Prunes a directory by magnitude; the record."""
    costs = Costs()
    source = open_directory(job.model)
    parse.check_globs(job.exclude, source.tensors)
    progress_dir.check_room(job, source, 1)
    ready = inputs.prepare(job, source) if job.evaluate else None
    found: dict[str, Any] = {}
    if ready is not None:
        model = models.find(job.model, job)
        models.say_ignored(model, console)
        with costs.phase("evaluate before"):
            found = inputs.dense(job, ready, model.read(), console)
    pruning = contextlib.ExitStack()

    def finish(
        written: Path, record: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
        """Measures what was written, before it takes its place."""
        pruning.close()
        more: dict[str, Any] = {}
        if ready is not None:
            with costs.phase("evaluate after"):
                after = measure(models.find(written, job).read(), ready.seen, job.batch)
                inputs.add(found, "pruned", after)
            more["perplexity"] = found
        counts = {k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()}
        more |= {"sizes": provenance.sizes(source, counts), **costs.facts()}
        return more, provenance.with_page({**record, **more})

    with pruning:
        pruning.enter_context(costs.phase("prune"))
        progress = pruning.enter_context(byte_progress(source.size, "pruning"))
        pruned = prune_directory(
            source,
            job.out,
            sparsity=job.sparsity,
            pattern=meaning.pattern,
            prunable=parse.streamed(job.exclude),
            provenance=provenance.making(arguments)
            | {
                "excluded": list(job.exclude),
                "pattern": parse.pattern_word(meaning.pattern),
            },
            overwrite=job.overwrite,
            progress=progress,
            finish=finish,
        )
    return rewrite.read_provenance(pruned.path)
