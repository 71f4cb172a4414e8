"""Which layers and experts a language model can do without."""

__all__ = [
    "expert_scores",
    "layer_search",
    "search",
    "units",
]
