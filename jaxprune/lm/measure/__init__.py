"""What a language model costs and how good it is: perplexity, speed, the machine."""

__all__ = [
    "harness_model",
    "machine",
    "perplexity",
    "speed",
    "tables",
]
