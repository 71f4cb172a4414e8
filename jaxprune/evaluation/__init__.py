"""Measuring, retraining and distilling a language model."""

__all__ = [
    "checkpoints",
    "distill",
    "documents",
    "expert_scores",
    "layer_search",
    "long_text",
    "machine",
    "perplexity",
    "retrain",
    "speed",
    "texts",
]
