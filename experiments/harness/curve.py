"""What a seed's dense run reported on its way, read back from the metrics' file."""

import json
from pathlib import Path
from typing import Any

from jaxprune.arrays.processes import on_first


def lines(metrics: Path, seed: int) -> list[dict[str, Any]]:
    """What the training of a seed reported.

    Args:
      metrics: the file of JSON lines; the first process reads it.
      seed: which.

    Returns:
      A dict a line, in order.
    """

    def read() -> list[dict[str, Any]]:
        every = map(json.loads, metrics.read_text().splitlines())
        return [x for x in every if x["phase"] == "train" and x["seed"] == seed]

    return on_first(read)


def points(reported: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training and validation loss over the steps of the dense run.

    Args:
      reported: as `lines` gives.

    Returns:
      "step", "loss" and "validation_loss" of each step with a loss; None where the
      latter was not measured.
    """
    return [
        {
            "step": line["step"],
            "loss": line.get("loss"),
            "validation_loss": line.get("validation_loss"),
        }
        for line in reported
        if line.get("loss") is not None
    ]
