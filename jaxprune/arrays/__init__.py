"""Leaves of a pytree and the devices they lie on; nothing here knows of pruning."""

__all__ = [
    "axes",
    "compiling",
    "console_progress",
    "counting",
    "exact_sum",
    "grouped_rows",
    "lazy",
    "low_bit",
    "merge",
    "meshes",
    "messages",
    "per_device",
    "placement",
    "processes",
    "rules",
    "sparsity",
    "topk",
    "tree",
]
