"""A function as a program: its matmuls, their weights, its segments, its axes."""

__all__ = [
    "axis_dims",
    "axis_groups",
    "axis_moves",
    "axis_primitives",
    "axis_trace",
    "joined_views",
    "linear_ops",
    "operands",
    "program",
    "segments",
    "weight_view",
]
