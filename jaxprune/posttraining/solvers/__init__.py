"""Algorithms that prune one matrix and update the weights that are kept."""

__all__ = [
    "alps",
    "block_mask",
    "dense_target",
    "layer_problem",
    "quantization",
    "sparsegpt",
    "units",
]
