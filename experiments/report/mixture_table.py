"""The table of `trained_mixture`: what is lost over the same seed's whole model."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments.report import findings
from experiments.report.tables import Report, Table

COLUMNS = (
    *("seed", "model", "ranking", "experts", "method", "sparsity", "removed"),
    *("intact", "loss", "recovered"),
)


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown: what is lost over the same seed's whole model."""
    steps = results["config"]["recover_steps"]
    unpruned = {
        (cell["seed"], cell["model"]): cell
        for cell in results["cells"]
        if not cell["removed"]
    }
    by_row: dict[tuple[float, str, str], dict[str, list[float]]] = {}
    for cell in results["cells"]:
        if not cell["removed"]:
            continue
        intact = unpruned[cell["seed"], cell["model"]]
        row = by_row.setdefault((cell["removed"], *_words(cell)), {})
        row.setdefault(cell["model"], []).append(cell["loss"] - intact["loss"])
        if cell["recovered"] is not None:
            excess = cell["recovered"] - intact["loss"]
            row.setdefault("recovered", []).append(excess)
    columns = ("mixture", "recovered", "dense")
    lines = [
        [f"{removed:.0%}", units, chooser]
        + [findings.mean(row.get(column, []), signed=True) for column in columns]
        for (removed, units, chooser), row in sorted(by_row.items())
    ]
    facts = {
        model: findings.mean(
            [cell["loss"] for (_, name), cell in unpruned.items() if name == model]
        )
        for model in ("mixture", "dense")
    }
    if routing := results["routing"]:  # of mixtures
        shares = _shares(routing.values())  # (seeds, layers, experts)
        text = f"{shares.min():.3f} to {shares.max():.3f}"
        facts["share of the tokens of an expert"] = text
    facts["seeds"] = ", ".join(map(str, sorted({seed for seed, _ in unpruned})))
    head = ["removed", "what", "by", "mixture", f"{steps} steps on", "dense model"]
    caption = "Lost in nats per token, over the whole model of the same seed"
    return Report(
        lead="A trained mixture without experts, without weights in them, and both",
        facts=facts,
        tables=[Table(head, lines, caption)],
        columns=COLUMNS,
        rows=[
            cell | {"intact": unpruned[cell["seed"], cell["model"]]["loss"]}
            for cell in results["cells"]
        ],
        figures={},
    )


def _words(cell: Mapping[str, Any]) -> tuple[str, str]:
    """What goes, and what chooses it."""
    if cell["ranking"] and cell["method"]:
        return "both", f"{cell['ranking']}, {cell['method']}"
    if cell["ranking"]:
        return "experts", cell["ranking"]
    return "weights", cell["method"]


def _shares(routing: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """The share of a layer's tokens that each expert is given."""
    counts = np.array([of_seed["tokens"] for of_seed in routing])
    shares: np.ndarray = counts / counts.sum(-1, keepdims=True)
    return shares
