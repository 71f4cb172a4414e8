"""Reference models in Flax NNX; nothing of the pruning code needs them."""
