"""Training after pruning: retraining on a text, distillation from the dense model."""

__all__ = [
    "checkpoints",
    "distill",
    "predictions",
    "retrain",
    "sampled_tokens",
]
