"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` the model is loaded too, before and after, to measure it.
"""

from typing import Any

from jaxprune.arrays import tree
from jaxprune.cli import models, parse, provenance, prune_inputs
from jaxprune.cli.console import Console, byte_progress
from jaxprune.cli.eval import measure
from jaxprune.cli.prune_options import Job, Meaning
from jaxprune.evaluation.machine import Costs
from jaxprune.formats.checkpoint_dir import TensorInfo, open_directory
from jaxprune.formats.prune_magnitude import prune_directory


def prune(
    job: Job, meaning: Meaning, console: Console, arguments: list[str]
) -> dict[str, Any]:
    """Prunes a directory by magnitude; the record."""
    costs = Costs()
    source = open_directory(job.model)
    parse.check_globs(job.exclude, source.tensors)
    ready = prune_inputs.prepare(job, source) if job.evaluate else None
    found: dict[str, Any] = {}
    if ready is not None:
        with costs.phase("evaluate before"):
            model = models.find(job.model, job).read()
            found = prune_inputs.dense(job, ready, model, console)
            del model

    def prunable(name: str, info: TensorInfo) -> bool:
        return tree.prunable(name, info) and not parse.matches(name, job.exclude)

    with costs.phase("prune"), byte_progress(source.size, "pruning") as progress:
        pruned = prune_directory(
            source,
            job.out,
            sparsity=job.sparsity,
            pattern=meaning.pattern,
            prunable=prunable,
            provenance=provenance.making(arguments) | {"excluded": list(job.exclude)},
            overwrite=job.overwrite,
            progress=progress,
        )
    if ready is not None:
        with costs.phase("evaluate after"):
            model = models.find(job.out, job).read()
            after = measure(model, ready.seen, job.batch)
            prune_inputs.add(found, "pruned", after)
    more = {"sizes": provenance.sizes(source, pruned.tensors), **costs.facts()}
    return provenance.complete(job.out, more | ({"perplexity": found} if found else {}))
