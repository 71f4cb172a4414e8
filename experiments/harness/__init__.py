"""What every experiment is run with: training, sweeping, checkpoints, records."""

__all__ = [
    "checkpoint",
    "criteria",
    "device_mesh",
    "manifest",
    "multi_process",
    "plan",
    "progress",
    "records",
    "run_dir",
    "runner",
    "solvers",
    "stages",
    "sweep",
    "task",
    "trainer",
    "training",
    "weights",
]
