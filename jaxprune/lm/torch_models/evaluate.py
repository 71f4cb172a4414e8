"""`jaxprune eval` of a model that goes through torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.arrays.rules import check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.option_rules import option_values
from jaxprune.lm.jobs.settings import Devices, Loading
from jaxprune.lm.measure.tables import perplexity_table
from jaxprune.lm.torch_models.measures import TorchMeasurements, load_metric
from jaxprune.lm.torch_models.model_inputs import check_input_files, read_measured
from jaxprune.lm.torch_models.opening import open_torch_model
from jaxprune.lm.torch_models.option_rules import LOADING_RULES
from jaxprune.lm.torch_models.routing import begin_through_torch


class Evaluation(NamedTuple):
    """What is asked of `jaxprune eval`.

    Attributes:
      model: directory of the model.
      dense: directory of the model that it is compared with, or None.
      inputs: texts, arrays or folders.
      context: tokens of a window of a text.
      limit: greatest number of samples of each; 0 takes all.
      batch: number of samples at once.
      stride: how far a window moves on, which no model through torch takes.
      metric: a user's own measure, MODULE:FUNCTION, or None.
      loading: settings of how the directory is read.
      devices: settings of what it runs on.
    """

    model: Path
    dense: Path | None
    inputs: Sequence[Path]
    context: int
    limit: int
    batch: int
    stride: int | None
    metric: str | None
    loading: Loading
    devices: Devices


def run_torch_eval(asked: Evaluation, console: Console) -> dict[str, Any]:
    """Measures a directory of transformers, through torch.

    Args:
      asked: model, inputs and settings.
      console: where the result is said.

    Returns:
      The results by name; JSON-able.

    Raises:
      ValueError: something does not fit.
    """
    values = option_values(asked.loading) | option_values(asked.devices)
    check(LOADING_RULES, **values, through_torch=True)
    if asked.stride is not None:
        raise ValueError(
            "a model that goes through torch takes no --stride; leave it out: windows "
            "follow each other"
        )
    # Files and the user's module before the model, which takes long to read.
    check_input_files(asked.inputs)
    metric = load_metric(asked.metric)
    begin_through_torch(asked.model, console)
    model = open_torch_model(open_directory(asked.model), asked.loading.dtype)
    measured = read_measured(
        asked.inputs, model, context=asked.context, limit=asked.limit or None
    )
    compares = any(item.targets is None for item in measured.values())
    if compares and metric is None and asked.dense is None:
        raise ValueError(
            f"{model.class_name} is no language model, so it is compared with the "
            "dense one; give --dense DIRECTORY, or --metric MODULE:FUNCTION"
        )
    measurements = TorchMeasurements(measured, asked.batch, metric, console)
    if asked.dense is not None:
        dense = open_torch_model(open_directory(asked.dense), asked.loading.dtype)
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
    return {"model": str(asked.model), "class": model.class_name, **facts}
