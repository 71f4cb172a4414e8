"""Which tokens a language model can do without, and its directory without them."""

__all__ = [
    "new_vocabulary",
    "token_choice",
    "tokenizer_files",
    "trim",
]
