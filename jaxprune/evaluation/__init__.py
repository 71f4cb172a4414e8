"""Measuring and retraining a language model on texts."""

__all__ = [
    "perplexity",
    "retrain",
    "texts",
]
