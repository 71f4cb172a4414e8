"""Benchmarks: one runnable module a claim, one JSON line each."""
