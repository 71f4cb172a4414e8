"""Scores to masks: patterns, how a sparsity is allocated, what is kept, pruning."""

__all__ = [
    "allocation",
    "checks",
    "combine",
    "counts",
    "find_masks",
    "masks",
    "matrix_mask",
    "metrics",
    "packed_mask",
    "packing",
    "patterns",
    "prune",
    "quotas",
    "selection",
    "shares",
    "sparsity",
]
