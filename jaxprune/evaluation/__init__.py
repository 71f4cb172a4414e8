"""Measuring and retraining a language model on texts, in few lines.

windows = perplexity.slide(tokens, context=512)
perplexity.measure(model, windows)["perplexity"]
"""

__all__ = [
    "machine",
    "perplexity",
    "retrain",
    "texts",
]
