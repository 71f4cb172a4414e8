"""Leaves of a pytree and the devices they lie on; nothing here knows of pruning."""

__all__ = [
    "axes",
    "console_progress",
    "exact_sum",
    "lazy",
    "low_bit",
    "messages",
    "placement",
    "processes",
    "sparsity",
    "topk",
    "tree",
]
