"""How well a model does: perplexity, likeness to the dense model, a user's own number.

The module is called as its class is, in torch: what is measured is what a user of the
directory gets. A language model has a perplexity; other models are compared with the
dense one on inputs that were held out.
"""

import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jaxprune.arrays.messages import one_line
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import describe_windows, format_perplexity
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.family_step import note_insane
from jaxprune.lm.torch_models.samples import Measured, as_tensors
from jaxprune.torch.conversion import as_result

Metric = Callable[[Any, list[dict[str, Any]]], Any]
"""A user's own measure: a function of the module and of batches of its arguments, in
torch tensors, to a number or {name: number}."""


def load_metric(word: str | None) -> Metric | None:
    """A user's own measure, which `--metric module:function` names.

    Args:
      word: name of the module, found where Python looks or in the working directory,
        and of the function; None for none.

    Returns:
      The function.

    Raises:
      ValueError: there is no such function.
      ImportError: the module cannot be imported.
    """
    if word is None:
        return None
    if not re.fullmatch(r"[\w.]+:\w+", word):
        raise ValueError(f"--metric must be module:function, got {word}")
    module, _, name = word.partition(":")
    # An installed command does not look where it was started.
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(function):
        raise ValueError(
            f"--metric {word} must name a function of the model and its batches, but "
            "the module has none of that name"
        )
    return function


@dataclasses.dataclass
class TorchMeasurements:
    """What is measured of a model, stage by stage.

    Attributes:
      measured: name to what the model is measured on.
      batch: number of samples that it sees at once.
      metric: a user's own measure, or None.
      console: where a result is noted.
      perplexity: name of a text to its perplexity at each stage.
      outputs: name to how far the outputs are from the dense ones at each stage.
      metrics: stage to a user's own numbers.
    """

    measured: Mapping[str, Measured]
    batch: int
    metric: Metric | None
    console: Console
    perplexity: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begins with nothing measured."""
        self._dense: dict[str, list[np.ndarray]] = {}

    def measure(self, stage: str, module: Any) -> None:
        """Measures a module at a stage; the first one is the dense model."""
        is_first = not self.perplexity
        for name, item in self.measured.items():
            if item.targets is None:
                self._compare(stage, name, item, module)
                continue
            text = self.perplexity.setdefault(name, {"role": item.role})
            if item.windows is not None:
                text |= describe_windows(item.windows)
            text[stage] = token_perplexity(module, item, self.batch)
            shown = format_perplexity(text[stage]["perplexity"])
            self.console.note(f"{stage}: perplexity {shown} on {name} ({item.role})")
        if is_first and self.perplexity:
            size = module.get_input_embeddings().num_embeddings
            note_insane(self.perplexity, stage, size, self.console.note)
        if self.metric is not None:
            self._measure_metric(stage, module, self.metric)

    def facts(self) -> dict[str, Any]:
        """What jaxprune.json says; JSON-able."""
        facts = {
            "perplexity": self.perplexity,
            "outputs": self.outputs,
            "metric": self.metrics,
        }
        return {name: value for name, value in facts.items() if value}

    def _compare(self, stage: str, name: str, item: Measured, module: Any) -> None:
        results = [
            main_output(run_module(module, batch))
            for batch in item.samples.batches(self.batch)
        ]
        # Kept for the stages that follow: (batch, ..., values) each.
        dense = self._dense.setdefault(name, results)
        if dense is results:  # there is nothing to compare it with
            return
        likeness = output_likeness(results, dense)
        if not math.isfinite(likeness["error"]):
            raise ValueError(
                f"the outputs of the {stage} model must be finite, but those on {name} "
                "are not; remove less, or give --dtype float32"
            )
        entry = self.outputs.setdefault(name, {"role": item.role})
        entry[stage] = likeness
        self.console.note(f"{stage}: {likeness_words(likeness)} on {name}")

    def _measure_metric(self, stage: str, module: Any, metric: Metric) -> None:
        batches = [
            as_tensors(batch)
            for item in self.measured.values()
            for batch in item.samples.batches(self.batch)
        ]
        with torch.no_grad():
            value = metric(module.eval(), batches)
        # One number has no name of its own.
        pairs = value if isinstance(value, Mapping) else {"metric": value}
        try:
            numbers = {str(n): float(number) for n, number in pairs.items()}
        except (TypeError, ValueError):
            numbers = {}
        if not numbers or not all(map(math.isfinite, numbers.values())):
            raise ValueError(
                "--metric must return a finite number or {name: number}, got "
                f"{one_line(repr(value))}"
            )
        self.metrics[stage] = numbers
        shown = ", ".join(f"{n} {number:.5g}" for n, number in numbers.items())
        self.console.note(f"{stage}: {shown}")


def run_module(module: Any, batch: Mapping[str, np.ndarray]) -> Any:
    """What a module gives for a batch of its arguments.

    Args:
      module: torch module in eval mode.
      batch: {argument: array}.

    Returns:
      Arrays in dictionaries, lists and tuples.
    """
    with torch.no_grad():
        return as_result(module(**as_tensors(batch)))


def main_output(result: Any) -> np.ndarray:
    """The output that a model is for: its logits, or else its first one.

    Args:
      result: what the module gave.

    Returns:
      float32 (batch, ...).
    """
    # A ModelOutput has its hidden states and caches beside.
    if isinstance(result, Mapping):
        for name in ("logits", "logits_per_image", "last_hidden_state"):
            if name in result:
                return np.asarray(result[name], np.float32)
    floating = [
        leaf
        for leaf in jax.tree.leaves(result)
        if jax.numpy.issubdtype(leaf.dtype, np.floating)
    ]
    return np.asarray(floating[0], np.float32)


def output_likeness(
    results: list[np.ndarray], dense: list[np.ndarray]
) -> dict[str, float]:
    """How far outputs are from the dense model's.

    Args:
      results: batches of outputs, (batch, ..., values) each.
      dense: the dense model's, likewise.

    Returns:
      "error", the norm of the difference over the dense norm, and "agreement", the
      share of positions whose greatest value is the same one.
    """
    pairs = list(zip(results, dense, strict=True))
    # Sums in 64 bits: a batch has millions of outputs.
    lost = sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in pairs)
    norm = sum(float((b.astype(np.float64) ** 2).sum()) for _, b in pairs)
    agreeing = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in pairs]
    return {
        "error": math.sqrt(lost / max(norm, 1e-30)),
        "agreement": float(np.concatenate(agreeing).mean()),
    }


def likeness_words(likeness: Mapping[str, float]) -> str:
    """How far outputs are from the dense ones, for people."""
    return (
        f"outputs {likeness['error']:.4g} from the dense ones, "
        f"{likeness['agreement']:.2%} of top answers the same"
    )


def token_perplexity(module: Any, item: Measured, batch: int) -> dict[str, Any]:
    """The perplexity of a language model, of tokens that follow or were hidden.

    Args:
      module: torch module whose logits are over tokens.
      item: inputs and targets.
      batch: number of samples at a time.

    Returns:
      As `perplexity.measure_perplexity`.
    """
    targets: Any = item.targets
    total, start = 0.0, 0
    with torch.no_grad():
        for arrays in item.samples.batches(batch):
            # (batch, length, vocabulary)
            logits = module(**as_tensors(arrays)).logits.float()
            rows = targets[start : start + len(logits)]  # (batch, length)
            start += len(logits)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1),
                torch.as_tensor(rows).flatten(),
                ignore_index=-1,
                reduction="sum",
            )
            total += float(losses)
    # Tokens that count, so that texts of any length compare.
    count = int((targets >= 0).sum())
    nats = total / count
    finite = math.isfinite(nats)
    size = None if item.windows is None else item.windows.bytes
    return {
        # exp overflows past 709
        "perplexity": math.exp(nats) if finite and nats < 700 else None,
        "nats": nats if finite else None,
        "bits_per_byte": perplexity.bits_per_byte(nats, count, size)
        if finite
        else None,
        "tokens": count,
        "windows": len(targets),
    }
