"""Measuring, retraining and distilling a language model, in few lines.

windows = perplexity.slide(tokens, context=512)
perplexity.measure(model, windows)["perplexity"]
"""

__all__ = [
    "distill",
    "machine",
    "perplexity",
    "retrain",
    "speed",
    "texts",
]
