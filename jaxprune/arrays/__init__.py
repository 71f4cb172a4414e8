"""Leaves of a pytree and the devices they lie on; nothing here knows of pruning."""

__all__ = [
    "axes",
    "exact_sum",
    "lazy",
    "low_bit",
    "placement",
    "processes",
    "sparsity",
    "tree",
]
