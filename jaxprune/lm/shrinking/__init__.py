"""Which channels, layers, experts, heads, neurons a language model can do without."""

__all__ = [
    "channel_fit",
    "channels",
    "expert_scores",
    "layer_search",
    "possible_sizes",
    "search",
    "size_choice",
    "unequal",
    "units",
]
