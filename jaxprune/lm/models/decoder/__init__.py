"""One decoder-only transformer for the families of checkpoints."""

__all__ = [
    "block",
    "cache",
    "config",
    "experts",
    "layers",
    "model",
    "rope",
]
