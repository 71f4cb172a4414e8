"""Which channels, layers and experts a language model can do without."""

__all__ = [
    "channel_fit",
    "channels",
    "expert_scores",
    "layer_search",
    "search",
    "units",
]
