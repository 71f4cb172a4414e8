"""What every experiment is run with: training, sweeping, checkpoints, records."""

__all__ = [
    "checkpoint",
    "criteria",
    "device_mesh",
    "manifest",
    "multi_process",
    "optimizer",
    "plan",
    "progress",
    "records",
    "run_dir",
    "runner",
    "seed_trainer",
    "solvers",
    "stages",
    "sweep",
    "task",
    "training",
    "watched_weights",
]
