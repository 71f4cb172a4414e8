"""How fast a smaller model is beside the one before, in words that claim no noise."""

from collections.abc import Mapping
from typing import Any

UNCLEAR = "not distinguishable"
_PHASES = ("prefill", "decode")


def model_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model that was timed, compared with the first, a header above.

    Args:
      record: record of `jaxprune speed`: "batch", and "models" by name.

    Returns:
      Cells.
    """
    header = ["tokens a second", "products", "bytes a token"]
    for phase in _PHASES:
        header += [phase, "times as fast", "by round"]
    rows = [header]
    for name, model in record["models"].items():
        size = f"{model['bytes_a_step'] / record['batch']:,.0f}"
        row = [name, model["dtype"], size]
        for phase in _PHASES:
            row += [f"{model[phase]:,.1f}", *_ratio_cells(model, phase)]
        rows.append(row)
    return rows


def _ratio_cells(model: Mapping[str, Any], phase: str) -> list[str]:
    if "ratios" not in model:
        return ["1", ""]
    ratio = model["ratios"][phase]
    factor = f"{ratio['ratio']:.2f}"
    if not ratio["distinguishable"]:
        factor += f", {UNCLEAR}"
    return [factor, f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
