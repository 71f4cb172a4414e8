"""A directory as other programs read it: GGUF for llama.cpp, models of trainers."""

__all__ = [
    "gguf_file",
    "gguf_shape",
    "gguf_tokenizer",
    "maxtext_checkpoint",
    "trainer_shape",
    "tunix_model",
]
