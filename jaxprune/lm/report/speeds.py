"""How fast a smaller model is beside the one before, in words that claim no noise."""

from collections.abc import Mapping
from typing import Any

HEADER = [
    *("tokens per second", "before", "after", "times as fast"),
    *("by round", "the dense model itself"),
]

UNCLEAR = "not distinguishable"
_PHASES = ("prefill", "decode")


def speed_rows(timed: Mapping[str, Any]) -> list[list[str]]:
    """A row for each phase, under `HEADER`.

    Args:
      timed: "before", "after" and "ratios" of `jaxprune.json`'s "speed".

    Returns:
      Cells.
    """
    rows = []
    for phase, of in timed["ratios"].items():
        before, after = (timed[when][phase] for when in ("before", "after"))
        factor = f"{of['ratio']:.2f}"
        rows.append(
            [
                phase,
                f"{before:,.1f}",
                f"{after:,.1f}",
                factor if of["distinguishable"] else f"{factor}, {UNCLEAR}",
                f"{of['low']:.2f} to {of['high']:.2f}",
                f"{1 / of['noise']:.2f} to {of['noise']:.2f}",
            ]
        )
    return rows


def decoding(timed: Mapping[str, Any]) -> str:
    """What may be said of the speed of decoding, as a clause."""
    of = timed["ratios"]["decode"]
    if of["distinguishable"]:
        spread = f"{of['low']:.2f} to {of['high']:.2f} by round"
        return f"decoding is {of['ratio']:.2f} times as fast ({spread})"
    return f"the speed of decoding is {UNCLEAR}"


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
