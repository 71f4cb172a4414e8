"""Pruning of a model that is already trained, with calibration batches."""

__all__ = [
    "calibration",
    "fingerprint",
    "input_statistics",
    "methods",
    "pipeline",
    "plan",
    "progress",
    "prune_trained",
    "refine",
    "relative_error",
    "sequential",
    "shrink_trained",
    "solve_weight",
    "solvers",
    "unit_rows",
]
