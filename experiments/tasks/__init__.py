"""What the experiments train: language models and models of pictures."""

__all__ = [
    "dense_models",
    "language",
    "language_model",
    "picture_checkpoint",
    "picture_model",
    "pictures",
]
