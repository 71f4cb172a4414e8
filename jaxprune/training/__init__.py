"""What happens inside the optimizer: optax transformations and their states."""

__all__ = [
    "event_table",
    "gradual",
    "grow",
    "keep_masks",
    "kept_units",
    "mask_events",
    "masked",
    "restarts",
    "running_average",
    "schedules",
    "straight_through",
    "track",
    "weightings",
]
