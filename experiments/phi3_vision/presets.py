"""The small Phi-3-vision that the experiment trains from nothing, and its words."""

from typing import Any

from experiments.datasets import picture_questions
from experiments.phi3_vision.vision_model import Tokenizer

SPECIAL = ("<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>")

_CPU = {
    "model_type": "phi3_v",
    "architectures": ["Phi3VForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "name": "clip_vision_model",
        "image_dim_out": 128,
        "num_img_tokens": 1,
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
    },
}
_SMOKE = {
    **_CPU,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "img_processor": {
        **_CPU["img_processor"],  # type: ignore[dict-item]
        "image_dim_out": 32,
        "vision_config": {
            **_CPU["img_processor"]["vision_config"],  # type: ignore[index]
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
    },
}
PRESETS: dict[str, dict[str, Any]] = {"cpu": _CPU, "smoke": _SMOKE}
"""Name to config.json, as Hugging Face has it."""


def words() -> Any:
    """The `tokenizers.Tokenizer` of the questions and answers: a token a word."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = [*SPECIAL, *picture_questions.vocabulary()]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    word_level = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    word_level.add_special_tokens(list(SPECIAL))
    return word_level


def tokenizer() -> Tokenizer:
    """Words of the questions and answers, a token each; others are "<unk>"."""
    word_level = words()
    return Tokenizer(
        encode=lambda text: word_level.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: str(word_level.decode(list(ids), skip_special_tokens=True)),
        bos=SPECIAL.index("<s>"),
    )
