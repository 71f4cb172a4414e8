"""A directory as GGUF, which llama.cpp runs."""

__all__ = ["gguf_file", "gguf_shape", "gguf_tokenizer"]
