"""What a fine-tuned model knows of another text, where a run measured that.

The tables and figures are those of the loss, of the results that `results.foreign`
gives: nats above the same seed's reference *on that text*. What fine-tuning itself
changed is in the first table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.report import findings

_RUNS = {
    "start": "before fine-tuning",
    "dense": "fine-tuned",
    "control": "fine-tuned, control",
}
_COLUMNS = {
    "loss": "held-out text: loss",
    "perplexity": "perplexity",
    "foreign_loss": "foreign text: loss",
    "foreign_perplexity": "perplexity",
}


def references(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The models that nothing was pruned of, on both texts; None without a foreign one.

    Texts that were measured each by itself have a column each.
    """
    seeds = results["seeds"]
    if any("foreign_loss" not in seed["dense"] for seed in seeds):
        return None
    texts = list(seeds[0]["dense"].get("foreign_by_text") or ())
    # A single text's loss stands in the common column already.
    text_columns = texts if len(texts) > 1 else []
    rows = []
    for run, label in _RUNS.items():
        models = [seed[run] for seed in seeds if seed.get(run)]
        if not models:
            continue
        row = [
            label,
            *(_mean([model.get(name) for model in models]) for name in _COLUMNS),
        ]
        row += [
            _mean([model["foreign_by_text"][text] for model in models])
            for text in text_columns
        ]
        rows.append(row)
    return {"header": ["", *_COLUMNS.values(), *text_columns], "rows": rows}


def _mean(values: list[float | None]) -> str:
    measured = [value for value in values if value is not None]
    return findings.mean(np.array(measured))
