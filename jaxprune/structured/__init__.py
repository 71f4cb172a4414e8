"""Smaller models: whole heads, neurons and channels out of the traced program."""

__all__ = [
    "budget",
    "choice",
    "cut",
    "module_sizes",
    "modules",
    "output_difference",
    "resized",
    "shrink",
    "shrunk_function",
    "sizes",
]
