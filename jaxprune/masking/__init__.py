"""Scores to masks: patterns, how a sparsity is allocated, what is kept, pruning."""

__all__ = [
    "allocation",
    "checks",
    "counts",
    "masks",
    "matrix_mask",
    "overlap",
    "packed_mask",
    "packing",
    "patterns",
    "prune",
    "selection",
]
