"""The small Phi-3-vision that the experiment trains from nothing, and its words."""

from typing import Any

from experiments.datasets import picture_questions
from experiments.phi3_vision.vision_model import Tokenizer

SPECIAL = ("<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>")


def _config(
    width: int, mlp_width: int, layers: int, heads: int, tower: dict[str, int]
) -> dict[str, Any]:
    clip = {"num_attention_heads": 4, "image_size": 28, "patch_size": 14, **tower}
    return {
        "model_type": "phi3_v",
        "architectures": ["Phi3VForCausalLM"],
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "img_processor": {"num_img_tokens": 1, "vision_config": clip},
    }


_TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": _config(192, 512, 4, 6, _TOWER),
    "smoke": _config(48, 96, 1, 4, _SMALL),
}
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
