"""Checkpoint directories and the compact file: read, written, pruned by magnitude."""

__all__ = [
    "checkpoint_dir",
    "compact",
    "compact_sizes",
    "compact_source",
    "directory_writer",
    "finite",
    "levels",
    "new_weights",
    "prune_magnitude",
    "rewrite",
]
