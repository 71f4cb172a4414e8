"""Smaller models: whole heads, neurons and channels out of the traced program."""

__all__ = [
    "budget",
    "choice",
    "cut",
    "modules",
    "resized",
    "shrink",
    "shrunk_function",
    "timing",
]
