"""Self-contained HTML pages about pruned models."""

__all__ = [
    "canvas",
    "page",
    "pruned_model",
]
