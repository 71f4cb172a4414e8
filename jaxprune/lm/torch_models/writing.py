"""The directory of a model that went through torch, in the form that it was read in.

Tensors that have not changed, and those that the class does not read, are copied byte
for byte; the others have the names, dtypes and places that they had.
"""

from typing import Any

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.jobs import provenance
from jaxprune.lm.jobs.console import byte_progress
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.torch_models.opening import (
    TorchModel,
    changed_tensors,
    stored_tensors,
)
from jaxprune.torch.conversion import as_numpy


def write_pruned(
    job: PruneJob, model: TorchModel, record: dict[str, Any], costs: Costs, page: Page
) -> None:
    """Writes the directory of a pruned model.

    Args:
      job: place of the result, and whether an earlier one is replaced.
      model: directory of the dense model, and the module with the pruned weights.
      record: what jaxprune.json says.
      costs: time and memory of each phase.
      page: function that makes report.html of the record.
    """
    source = model.source
    stored = stored_tensors(model.module)
    # By their bits: what is written is what differs.
    replaced = {
        name: as_numpy(stored[name]) for name in changed_tensors(source, stored)
    }
    # Norms and biases that a refinement moved have no sparsity.
    vectors = [name for name, array in replaced.items() if array.ndim < 2]
    # (zeros, size) of each matrix, for the sizes on the page.
    counts = {
        name: (int(array.size - (array != 0).sum()), int(array.size))
        for name, array in replaced.items()
        if name not in vectors
    }
    sizes = provenance.weight_sizes(source, counts, job.quantization)
    with byte_progress(source.size, "writing") as progress:
        rewrite.write_directory(
            source,
            job.out,
            replaced,
            uncounted=vectors,
            provenance={**record, **costs.facts(), "sizes": sizes},
            overwrite=job.overwrite,
            progress=progress,
            finish=lambda _, facts: ({}, provenance.page_file(page, facts)),
        )
