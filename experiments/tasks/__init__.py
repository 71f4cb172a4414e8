"""Language models and text, as the stages of a run see them."""

__all__ = [
    "finetuning",
    "language_model",
    "language_task",
    "model_directory",
    "pure_model",
    "tiny_directory",
]
