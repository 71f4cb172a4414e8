"""A function as a program: its matmuls, their weights, its segments, its axes."""

__all__ = [
    "axis_arithmetic",
    "axis_dims",
    "axis_groups",
    "axis_moves",
    "axis_trace",
    "equation",
    "linear_ops",
    "operands",
    "primitives",
    "program",
    "resize_rules",
    "segments",
    "view_rules",
    "weight_parts",
    "weight_view",
]
