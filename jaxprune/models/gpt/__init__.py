"""GPT-2 in Flax NNX, as nanoGPT has it: the model that the experiments train."""

from jaxprune.models.gpt.config import PRESETS as PRESETS
from jaxprune.models.gpt.config import GPTConfig as GPTConfig
from jaxprune.models.gpt.config import flops_per_token as flops_per_token
from jaxprune.models.gpt.config import matrix_sizes as matrix_sizes
from jaxprune.models.gpt.config import preset as preset
from jaxprune.models.gpt.model import GPT as GPT
from jaxprune.models.gpt.model import loss as loss

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "flops_per_token",
    "loss",
    "matrix_sizes",
    "preset",
]
