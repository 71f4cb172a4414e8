"""Algorithms that prune one matrix and update the weights that are kept."""

__all__ = [
    "alps",
    "dense_target",
    "layer_problem",
    "quantization",
    "sparsegpt",
    "units",
]
