"""A tiny language model as a Hugging Face directory: random weights, a token a byte."""

import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from safetensors.numpy import save_file

from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder

_SPECIAL = ("<bos>", "<eos>")
CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 256 + len(_SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
"""config.json: a Gemma 3 of two layers."""


def write(directory: Path) -> Path:
    """Writes the directory, the same bytes each time; needs the package tokenizers."""
    directory.mkdir(parents=True, exist_ok=True)
    graph, params = nnx.split(Decoder(hf.decoder_config(CONFIG), rngs=nnx.Rngs(0)))
    # Of deviation 0.1: in a model this narrow the usual 0.02 would do next to nothing.
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 else leaf, params)
    tensors = dict(hf.tensors(nnx.merge(graph, params), CONFIG))
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    _words().save(str(directory / "tokenizer.json"))
    return directory


def _words() -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: i for i, letter in enumerate(letters)}
    bytes_tokenizer = tokenizers.Tokenizer(models.BPE(numbers, merges=[]))
    bytes_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_tokenizer.decoder = decoders.ByteLevel()
    bytes_tokenizer.add_special_tokens(list(_SPECIAL))
    # Texts begin with BOS by the template, which alone says so in transformers 5.
    bytes_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", CONFIG["bos_token_id"])]
    )
    return bytes_tokenizer
