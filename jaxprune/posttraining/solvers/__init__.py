"""Algorithms that prune one matrix and update the weights that are kept."""

__all__ = [
    "alps",
    "layer_problem",
    "sparsegpt",
]
