"""Experiments: one runnable module a question."""
