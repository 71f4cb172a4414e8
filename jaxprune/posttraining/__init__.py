"""Pruning of a model that is already trained, with calibration batches."""

__all__ = [
    "calibration",
    "fingerprint",
    "methods",
    "plan",
    "progress",
    "prune_trained",
    "sequential",
    "solve_weight",
    "solvers",
]
