"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` the model is loaded too, before and after, to measure it.
"""

from typing import Any

from jaxprune.arrays.tree import prunable
from jaxprune.cli import models, parse, provenance, prune_inputs
from jaxprune.cli.console import Console
from jaxprune.cli.costs import Costs
from jaxprune.cli.eval import measure
from jaxprune.cli.prune_options import Job, Meaning
from jaxprune.formats.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.formats.prune_magnitude import prune_directory
from jaxprune.typing import Pattern


def prune(
    job: Job, meaning: Meaning, console: Console, arguments: list[str]
) -> dict[str, Any]:
    """Prunes a directory by magnitude.

    Args:
      job: what is done.
      meaning: of its words.
      console: hears of it.
      arguments: of the command.

    Returns:
      The record.

    Raises:
      ValueError: something does not fit.
      OSError: a file could not be read or written.
    """
    costs = Costs()
    source = open_directory(job.model)
    parse.check_globs(job.exclude, source.tensors)
    ready = prune_inputs.prepare(job, source) if job.evaluate else None
    found: dict[str, Any] = {}
    if ready is not None:
        with costs.phase("evaluate before"):
            model = models.found(job.model, job).read()
            found = prune_inputs.dense(job, ready, model, console)
            del model
    told = provenance.making(arguments) | {"excluded": list(job.exclude)}
    with costs.phase("prune"):
        counts = _write(job, meaning.pattern, source, told, console)
    if ready is not None:
        with costs.phase("evaluate after"):
            model = models.found(job.out, job).read()
            after = measure(model, ready.seen, job.batch, console)
            prune_inputs.add(found, "pruned", after)
    more = {"sizes": provenance.sizes(source, counts), **costs.facts()}
    return provenance.complete(job.out, more | ({"perplexity": found} if found else {}))


def _write(
    job: Job,
    pattern: Pattern,
    source: CheckpointDir,
    told: dict[str, Any],
    console: Console,
) -> dict[str, tuple[int, int]]:
    total = sum(info.size for info in source.tensors.values())
    with console.bar("pruning", total, "B") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        return prune_directory(
            source,
            job.out,
            sparsity=job.sparsity,
            pattern=pattern,
            prunable=lambda name, info: (
                prunable(name, info) and not parse.matches(name, job.exclude)
            ),
            provenance=told,
            overwrite=job.overwrite,
            progress=progress,
        ).tensors
