"""One decoder-only transformer for the families of checkpoints."""

__all__ = ["cache", "config", "layers", "model", "rope"]
