"""Hugging Face checkpoint directories into models and back."""

from jaxprune.lm.models.hf.families import decoder_config
from jaxprune.lm.models.hf.loading import Loaded, abstract, embedded, load, tensors
from jaxprune.lm.models.hf.parameters import Dtype, Shardings, split_over, to_tensors
from jaxprune.lm.models.hf.smaller import (
    changed_axes,
    keep_experts,
    keep_layers,
    keep_tokens,
    resized,
    write_smaller,
)
from jaxprune.lm.models.hf.smaller_config import (
    heads_that_fit,
    shrinkable,
    smaller_config,
    when_heads_fit,
)
from jaxprune.lm.models.hf.tensor_names import Source
from jaxprune.lm.models.hf.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Dtype",
    "Loaded",
    "Shardings",
    "Source",
    "Tokenizer",
    "abstract",
    "changed_axes",
    "decoder_config",
    "embedded",
    "heads_that_fit",
    "keep_experts",
    "keep_layers",
    "keep_tokens",
    "load",
    "load_tokenizer",
    "resized",
    "shrinkable",
    "smaller_config",
    "smaller_tensors",
    "split_over",
    "tensors",
    "to_tensors",
    "when_heads_fit",
    "write_smaller",
]
