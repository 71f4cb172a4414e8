"""What happens inside the optimizer: optax transformations and their states."""

__all__ = [
    "keep_masks",
    "lora",
    "running_average",
    "state_sharding",
    "track",
    "weightings",
]
