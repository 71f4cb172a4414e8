"""Files of models: safetensors, checkpoint directories, the compact file."""

__all__ = [
    "atomic",
    "checkpoint_dir",
    "compact",
    "compact_archive",
    "compact_sizes",
    "levels",
    "new_weights",
    "prune_magnitude",
    "rewrite",
    "safetensors_file",
]
