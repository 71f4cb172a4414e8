"""GPT-2 in Flax NNX, as nanoGPT has it: the model that the experiments train.

`jaxprune.lm.models.decoder` has this shape too, but not what training it from nothing
needs: dropout and nanoGPT's initialisation.
"""

from experiments.gpt.config import (
    PRESETS,
    GPTConfig,
    flops_per_token,
    matrix_sizes,
    preset,
)
from experiments.gpt.model import GPT, loss

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "config",
    "flops_per_token",
    "loss",
    "matrix_sizes",
    "model",
    "preset",
]
