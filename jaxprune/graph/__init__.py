"""A function as the program it traces to: its matmuls, their weights, its segments."""

__all__ = [
    "linear_ops",
    "program",
    "segments",
    "weight_view",
]
