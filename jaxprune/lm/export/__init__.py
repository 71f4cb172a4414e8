"""A model's directory as one file of another program: GGUF, which llama.cpp reads."""

__all__ = ["gguf_file", "gguf_shape", "gguf_tokenizer"]
