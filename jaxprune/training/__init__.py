"""What happens inside the optimizer: optax transformations and their states."""

__all__ = [
    "admm",
    "event_table",
    "find_masks",
    "gradual",
    "grow",
    "keep_masks",
    "lora",
    "mask_events",
    "masked",
    "running_average",
    "schedules",
    "state_sharding",
    "straight_through",
    "track",
    "weightings",
]
