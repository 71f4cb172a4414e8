"""Self-contained HTML pages about pruned and smaller models."""

__all__ = [
    "canvas",
    "page",
    "pruned_model",
    "shrunk_model",
    "speeds",
    "stages",
]
