"""The stages at which a model's perplexity is measured, in their order."""

from collections.abc import Mapping
from typing import Any

STAGES = ("dense", "before", "pruned", "shrunk", "trimmed", "recovered")


def measured(record: Mapping[str, Any]) -> list[str]:
    """The stages at which every text of a record was measured."""
    texts = record.get("perplexity") or {}
    return [s for s in STAGES if texts and all(s in of for of in texts.values())]
