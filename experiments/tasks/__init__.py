"""What the experiments train: language models and models of pictures."""

__all__ = [
    "dense_models",
    "finetuning",
    "language",
    "language_model",
    "model_directory",
    "picture_checkpoint",
    "picture_model",
    "pictures",
    "pure_model",
    "tiny_directory",
]
