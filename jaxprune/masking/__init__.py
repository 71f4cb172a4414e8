"""Scores to masks: patterns, how a sparsity is allocated, what is kept, pruning."""

__all__ = [
    "allocation",
    "checks",
    "masks",
    "matrix_mask",
    "packing",
    "patterns",
    "prune",
    "rules",
    "selection",
]
