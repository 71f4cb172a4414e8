"""Language models in directories: read, measured, pruned, shrunk and written again.

It needs the extra `[lm]`; nothing outside of this folder imports it.
"""

__all__ = [
    "checkpoints",
    "cli",
    "export",
    "jobs",
    "measure",
    "models",
    "packing",
    "recovery",
    "report",
    "shrinking",
    "texts",
    "torch_models",
    "vocabulary",
]
