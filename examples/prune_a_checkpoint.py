"""Prune a checkpoint, train what is left, make a smaller one, and compare them.

Give the directory of a real model and texts, or nothing: then a tiny Llama with random
weights is written first.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import jaxprune.lm as lm
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


def tiny_llama(directory: Path) -> list[str]:
    """Writes a model as the Hugging Face hub has them, and token ids; their paths."""
    directory.mkdir()
    decoder = Decoder(hf.decoder_config(CONFIG), rngs=nnx.Rngs(0))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(hf.tensors(decoder, CONFIG)), directory / "model.safetensors")
    rows = np.random.default_rng(0).integers(0, 256, (24, 64)).astype(np.int32)
    np.save(directory / "rows.npy", rows)
    return [str(directory), str(directory / "rows.npy")]


work = Path(tempfile.mkdtemp())
path, *files = sys.argv[1:] or tiny_llama(work / "model")

model = lm.open(path)
texts = lm.texts(*files, sequences=16, length=64)
pruned = lm.prune(model, texts, sparsity=0.5, effort="quick")
tuned = lm.recover(pruned, texts, teacher=model, steps=16)
small = lm.shrink(model, texts, ffn=0.5)
print(lm.evaluate([model, pruned, tuned, small], texts))
lm.save(tuned, work / "out")
