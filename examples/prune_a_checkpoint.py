"""Prune a checkpoint directory with the command, read it back, pack it into one file.

Give the directory of a real model, `python examples/prune_a_checkpoint.py MODEL`, or
none: then a tiny Llama with random weights is written first.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxprune.lm import cli

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


def tiny_llama(directory: Path) -> Path:
    """Writes config.json and model.safetensors as the Hugging Face hub has them."""
    layer = {f"self_attn.{name}_proj": (64, 64) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)}
    layer |= {"mlp.down_proj": (64, 128), "input_layernorm": (64,)}
    layer |= {"post_attention_layernorm": (64,)}
    shapes = {"model.embed_tokens": (256, 64), "model.norm": (64,)}
    shapes |= {"lm_head": (256, 64)}
    for number in range(2):
        shapes |= {f"model.layers.{number}.{k}": shape for k, shape in layer.items()}
    draw = np.random.default_rng(0).normal
    tensors = {f"{k}.weight": draw(0, 0.02, s).astype("f4") for k, s in shapes.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


work = Path(tempfile.mkdtemp())
model = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_llama(work / "model")

# The same as `jaxprune prune MODEL OUT ...` in a shell. Magnitude needs no text. Of a
# model with a tokenizer, --method sparsegpt --calibration prose.txt prunes better.
options = ["--method", "magnitude", "--pattern", "2:4"]
out = str(work / "out")
commands = [["prune", str(model), out, *options], ["inspect", out]]
if any(map(cli.main, [*commands, ["compact", out, f"{out}.jaxprune"]])):
    sys.exit(1)

for path in sorted((work / "out").glob("*.safetensors")):
    for name, tensor in load_file(path).items():
        print(f"{name:50s} {np.mean(tensor == 0):5.1%} zeros")
