"""Which layers, experts, heads and neurons a language model can do without."""

__all__ = [
    "expert_scores",
    "layer_search",
    "possible_sizes",
    "units",
]
