"""Directories of transformers that are no family of ours: their classes, through torch.

`routing` says which directories come here, and imports no torch; the other modules need
the extra [transformers]. A model is loaded by the class that its config.json names,
pruned as the JAX function of `jp.torch.function`, and written as it was stored.
"""

__all__ = [
    "array_samples",
    "choosing",
    "evaluate",
    "inspection",
    "measures",
    "media_samples",
    "model_inputs",
    "opening",
    "prune",
    "routing",
    "samples",
    "shrink",
    "shrink_sizes",
    "text_samples",
    "torch_step",
]
