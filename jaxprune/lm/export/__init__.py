"""A directory as other programs read it: GGUF for llama.cpp, models of trainers."""

__all__ = [
    "gguf_file",
    "gguf_shape",
    "gguf_tokenizer",
    "maxtext_checkpoint",
    "maxtext_tensors",
    "trained_weights",
    "trainer_shape",
    "tunix_model",
    "tunix_tensors",
]
