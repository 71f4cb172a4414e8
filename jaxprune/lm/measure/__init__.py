"""What a language model costs and how good it is: perplexity, speed, the machine."""

__all__ = [
    "machine",
    "perplexity",
    "speed",
    "tables",
]
