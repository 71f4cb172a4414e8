"""The page of any step's result."""

from collections.abc import Mapping
from typing import Any

from jaxprune.lm.report import pruned_model, recovered_model, shrunk_model


def page_of(record: Mapping[str, Any]) -> str:
    """The HTML page of what jaxprune.json says of a model."""
    pages = {"prune": pruned_model, "recover": recovered_model}
    return pages.get(record["step"], shrunk_model).document(record)
