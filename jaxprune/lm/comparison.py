"""Models side by side: perplexity, bytes, tokens a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.arrays.messages import columns
from jaxprune.lm.measure.tables import format_bits, format_perplexity
from jaxprune.lm.model import Model, Texts, console_of
from jaxprune.lm.steps import speed as speeds
from jaxprune.lm.steps.evaluate import EvaluateJob
from jaxprune.lm.steps.packing import Packing
from jaxprune.lm.torch_models import choosing


class Results(NamedTuple):
    """What was measured of some models; prints as a table.

    Attributes:
      models: path of each model to its results: "texts" by name, "bytes", and where it
        was asked for, "tokens_a_second".
    """

    models: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        """A row for each model and text."""
        rows = [["model", "text", "perplexity", "bits/byte", "bytes", "tokens/s"]]
        for name, result in self.models.items():
            speed = result.get("tokens_a_second")
            last = [f"{result['bytes']:,}", "-" if speed is None else f"{speed:,.1f}"]
            for text, of in result["texts"].items():
                shown = format_perplexity(of["perplexity"])
                rows.append(
                    [name, text, shown, format_bits(of["bits_per_byte"]), *last]
                )
        return columns(rows, right=True)


def evaluate(
    models: Model | Sequence[Model], texts: Texts, *, speed: bool = False
) -> Results:
    """The perplexity and size of models, side by side.

    Args:
      models: models, one after the other in memory.
      texts: texts; those to `evaluate` where it names some, or all else whole.
      speed: whether to time decoding too, all models in memory together.

    Returns:
      The results, which print as a table.

    Raises:
      ValueError: a model or a text does not fit.
    """
    given = [models] if isinstance(models, Model) else [*models]
    files = texts.options["evaluate"] or texts.files
    results = {}
    for model in given:
        with console_of(model) as console:
            job = EvaluateJob(model=model.path, text=files, loading=model.loading)
            measured = choosing.evaluate(job, console)
        size = sum(path.stat().st_size for path in _weights(model.path))
        results[str(model.path)] = {**measured, "bytes": size}
    if speed:
        for name, rate in _decoding_speeds(given).items():
            results[name]["tokens_a_second"] = rate
    return Results(results)


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else [*path.glob("*.safetensors")]


def _decoding_speeds(models: Sequence[Model]) -> dict[str, float]:
    """Path of each model to the tokens a second that it decodes."""
    loading = models[0].loading
    with console_of(models[0]) as console:
        paths = [model.path for model in models]
        candidates = speeds.read_candidates(paths, loading, Packing(), 1, console)
        timed = speeds.time_candidates(
            candidates, prompt=256, steps=32, batch=1, rounds=5
        )
    return {name: of["decode"] for name, of in timed["models"].items()}
