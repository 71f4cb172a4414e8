"""Hugging Face checkpoint directories into models and back."""

from jaxprune.lm.models.hf.block_configs import NAME as BLOCK_CONFIGS
from jaxprune.lm.models.hf.block_configs import block_configs
from jaxprune.lm.models.hf.families import decoder_config, vision_config
from jaxprune.lm.models.hf.loading import Loaded, abstract, embedded, load, tensors
from jaxprune.lm.models.hf.narrower import check_channels, keep_channels
from jaxprune.lm.models.hf.parameters import Dtype, Shardings, split_over, to_tensors
from jaxprune.lm.models.hf.rotation import can_rotate, rotate_channels
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
    with_width,
)
from jaxprune.lm.models.hf.tensor_names import Source
from jaxprune.lm.models.hf.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BLOCK_CONFIGS",
    "Dtype",
    "Loaded",
    "Shardings",
    "Source",
    "Tokenizer",
    "abstract",
    "block_configs",
    "can_rotate",
    "changed_axes",
    "check_channels",
    "decoder_config",
    "embedded",
    "heads_that_fit",
    "keep_channels",
    "keep_experts",
    "keep_layers",
    "keep_tokens",
    "load",
    "load_tokenizer",
    "resized",
    "rotate_channels",
    "shrinkable",
    "smaller_config",
    "smaller_tensors",
    "split_over",
    "tensors",
    "to_tensors",
    "vision_config",
    "when_heads_fit",
    "with_width",
    "write_smaller",
]
