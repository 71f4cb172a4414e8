"""Reference models in Flax NNX; nothing of the pruning code needs them."""

__all__ = [
    "decoder",
    "generate",
    "hf",
    "loaded_model",
    "placement",
    "product",
]
