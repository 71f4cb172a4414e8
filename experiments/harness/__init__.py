"""What every experiment is run with: training, sweeping, checkpoints, records."""

__all__ = [
    "checkpoint",
    "criteria",
    "device_mesh",
    "optimizer",
    "plan",
    "progress",
    "records",
    "runner",
    "seed_trainer",
    "solvers",
    "sweep",
    "task",
    "training",
]
