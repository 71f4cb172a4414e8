"""The page of a model that was trained on after weights went: losses, perplexities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxprune.lm.report import canvas, page
from jaxprune.lm.report.stages import measured


def document(record: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
      record: what jaxprune.json says: "training", "sizes", "perplexity", "seconds",
        "device" and the like.

    Returns:
      A self-contained page.
    """
    training = record["training"]
    return page.render(
        "recovered_model.html",
        title="A recovered model",
        record=record,
        headline=headline(record),
        facts=_facts(record),
        stages=measured(record),
        losses={"losses": _curve(training["losses"])},
    )


def headline(record: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    training = record["training"]
    teacher = training["teacher"]
    how = "on texts" if teacher is None else f"after {teacher}"
    trained = f"{training['steps']} steps of training {how}"
    return f"{': '.join(filter(None, [trained, page.perplexity_change(record)]))}."


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    training, sizes = record["training"], record["sizes"]
    rate = f"{training['learning_rate']:g}"
    if training["relative"]:
        rate += " of each tensor's root mean square"
    facts = {
        "trained": training["trained"],
        "learning rate": rate,
        "sequences a step": training["batch"],
        "texts' share of the loss": training["text_share"],
        "texts": page.calibration(record),
        "zero": f"{sizes['zeros']:,} of {sizes['parameters']:,} parameters",
        "time": page.duration(record["seconds"]),
        "device": record["device"],
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


@canvas.STYLE
def _curve(losses: Sequence[float]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8))
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=canvas.FAINT, linewidth=0.8)
    width = max(1, len(losses) // 20)
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width // 2 :][: len(means)], means, color="#0072b2")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    figure.tight_layout()
    return figure
