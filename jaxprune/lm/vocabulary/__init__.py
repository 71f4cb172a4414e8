"""Which tokens a language model can do without, and its directory without them."""

__all__ = [
    "expected_counts",
    "new_vocabulary",
    "token_choice",
    "tokenizer_files",
    "trim",
]
