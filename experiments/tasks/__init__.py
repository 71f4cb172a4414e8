"""What the experiments train: language models and models of pictures."""

__all__ = [
    "finetuning",
    "language_model",
    "language_task",
    "model_directory",
    "picture_model",
    "picture_task",
    "pure_model",
    "tiny_directory",
    "vision_model",
]
