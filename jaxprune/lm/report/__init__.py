"""Self-contained HTML pages about pruned, smaller and recovered models."""

__all__ = [
    "canvas",
    "document",
    "page",
    "pruned_model",
    "recovered_model",
    "shrunk_model",
    "speeds",
    "stages",
]
