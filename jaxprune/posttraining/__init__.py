"""Pruning of a model that is already trained, with calibration batches."""

__all__ = [
    "calibration",
    "fingerprint",
    "old_zeros",
    "passes",
    "pipeline",
    "plan",
    "progress",
    "prune_trained",
    "pruner",
    "relative_error",
    "shrink",
    "solve_weight",
    "solvers",
    "unit_remover",
    "unit_rows",
]
