"""GPT-2 in Flax NNX, as nanoGPT has it: the model that the experiments train."""

from experiments.gpt.config import PRESETS as PRESETS
from experiments.gpt.config import GPTConfig as GPTConfig
from experiments.gpt.config import flops_per_token as flops_per_token
from experiments.gpt.config import matrix_sizes as matrix_sizes
from experiments.gpt.config import preset as preset
from experiments.gpt.model import GPT as GPT
from experiments.gpt.model import loss as loss

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "flops_per_token",
    "loss",
    "matrix_sizes",
    "preset",
]
