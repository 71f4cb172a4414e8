"""Hugging Face checkpoint directories into models and back."""

from jaxprune.models.hf.leaves import Dtype as Dtype
from jaxprune.models.hf.leaves import Shardings as Shardings
from jaxprune.models.hf.leaves import to_tensors as to_tensors
from jaxprune.models.hf.loading import Loaded as Loaded
from jaxprune.models.hf.loading import embedded as embedded
from jaxprune.models.hf.loading import load as load
from jaxprune.models.hf.loading import tensors as tensors
from jaxprune.models.hf.tensor_names import Source as Source
from jaxprune.models.hf.tokenizer import Tokenizer as Tokenizer
from jaxprune.models.hf.tokenizer import tokenizer as tokenizer

__all__ = [
    "Dtype",
    "Loaded",
    "Shardings",
    "Source",
    "Tokenizer",
    "embedded",
    "load",
    "tensors",
    "to_tensors",
    "tokenizer",
]
