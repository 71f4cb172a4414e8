"""One decoder-only transformer for the families of checkpoints."""

__all__ = [
    "config",
    "layers",
    "model",
    "rope",
]
