"""Pruning of a model that is already trained, with calibration batches."""

__all__ = [
    "calibration",
    "fingerprint",
    "input_statistics",
    "methods",
    "plan",
    "progress",
    "prune_trained",
    "pruner",
    "sequential",
    "solve_weight",
    "solvers",
]
