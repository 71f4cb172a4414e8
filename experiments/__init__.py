"""Experiments: one runnable module a question."""

__all__ = [
    "allocation_with_solvers",
    "compare",
    "datasets",
    "finetuned_llm",
    "gpt",
    "harness",
    "phi3_vision",
    "prune_while_training",
    "recovery",
    "refined_solvers",
    "report",
    "scaled_down_llm",
    "tasks",
    "trained_mixture",
]
