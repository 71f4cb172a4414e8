"""What every experiment is run with: training, sweeping, checkpoints, records."""

__all__ = [
    "checkpoint",
    "checkpoint_leaves",
    "criteria",
    "device_mesh",
    "manifest",
    "multi_process",
    "optimizer",
    "option_rules",
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
