"""Experiments: one runnable module a question."""

__all__ = [
    "datasets",
    "finetuned_llm",
    "gpt",
    "harness",
    "phi3_vision",
    "prune_while_training",
    "report",
    "scaled_down_llm",
    "tasks",
]
