"""`jaxprune eval` of a model that goes through torch."""

from typing import Any

from jaxprune.arrays.rules import check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.measure.tables import perplexity_table
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.evaluate import EvaluateJob
from jaxprune.lm.steps.option_rules import option_values
from jaxprune.lm.steps.rules import THROUGH_TORCH
from jaxprune.lm.torch_models.measures import TorchMeasurements, load_metric
from jaxprune.lm.torch_models.model_inputs import check_input_files, read_measured
from jaxprune.lm.torch_models.opening import open_torch_model
from jaxprune.lm.torch_models.routing import begin_through_torch


def run_torch_eval(job: EvaluateJob, console: Console) -> dict[str, Any]:
    """Measures a directory of transformers, through torch.

    Args:
      job: options of the measurement; its texts may be other inputs.
      console: where the result is said.

    Returns:
      The results by name; JSON-able.

    Raises:
      ValueError: something does not fit.
    """
    check(THROUGH_TORCH, **option_values(job.loading), through_torch=True)
    if job.stride is not None:
        raise ValueError(
            "a model that goes through torch takes no --stride; leave it out: windows "
            "follow each other"
        )
    # Files and the user's module before the model, which takes long to read.
    check_input_files(job.text)
    metric = load_metric(job.metric)
    begin_through_torch(job.model, console)
    model = open_torch_model(open_directory(job.model), job.loading.dtype)
    measured = read_measured(
        job.text, model, context=job.context, limit=job.limit or None
    )
    compares = any(item.targets is None for item in measured.values())
    if compares and metric is None and job.dense is None:
        raise ValueError(
            f"{model.class_name} is no language model, so it is compared with the "
            "dense one; give --dense DIRECTORY, or --metric MODULE:FUNCTION"
        )
    measurements = TorchMeasurements(measured, job.batch, metric, console)
    if job.dense is not None:
        dense = open_torch_model(open_directory(job.dense), job.loading.dtype)
        if dense.class_name != model.class_name:
            raise ValueError(
                "--dense must be the model as it was before, of the same class, but "
                f"they are {dense.class_name} and {model.class_name}"
            )
        measurements.measure("dense", dense.module)
        del dense  # two models need not be in memory
    measurements.measure("model", model.module)
    # As `jaxprune eval` has them of the families of ours.
    texts = {
        name: {k: v for k, v in text.items() if k not in ("role", "model")}
        | text["model"]
        for name, text in measurements.perplexity.items()
    }
    if texts:
        console.say(perplexity_table(texts))
    facts = measurements.facts() | {"texts": texts}
    facts.pop("perplexity", None)
    return {"model": str(job.model), "class": model.class_name, **facts}
