"""Hugging Face checkpoint directories into models and back."""

from jaxprune.models.hf.families import decoder_config as decoder_config
from jaxprune.models.hf.families import vision_config as vision_config
from jaxprune.models.hf.loading import Loaded as Loaded
from jaxprune.models.hf.loading import abstract as abstract
from jaxprune.models.hf.loading import embedded as embedded
from jaxprune.models.hf.loading import load as load
from jaxprune.models.hf.loading import tensors as tensors
from jaxprune.models.hf.parameters import Dtype as Dtype
from jaxprune.models.hf.parameters import Shardings as Shardings
from jaxprune.models.hf.parameters import to_tensors as to_tensors
from jaxprune.models.hf.tensor_names import Source as Source
from jaxprune.models.hf.tokenizer import Tokenizer as Tokenizer
from jaxprune.models.hf.tokenizer import load_tokenizer as load_tokenizer

__all__ = [
    "Dtype",
    "Loaded",
    "Shardings",
    "Source",
    "Tokenizer",
    "abstract",
    "decoder_config",
    "embedded",
    "load",
    "load_tokenizer",
    "tensors",
    "to_tensors",
    "vision_config",
]
