"""Tiny directories of the families that MaxText and Tunix have, with zeros in them."""

import ml_dtypes
import numpy as np

from jaxprune.lm import cli
from tests.support import tiny_hf

# The only base that Tunix has for them.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
# Sizes that no preset has; a Gemma 3 with a layer left over.
CHANGES = {
    "llama": PLAIN,
    "qwen3": PLAIN,
    "gemma3": {
        "num_hidden_layers": 7,
        "layer_types": [
            "full_attention" if i == 5 else "sliding_attention" for i in range(7)
        ],
        "query_pre_attn_scalar": 16,
    },
}


def pruned_folder(name, folder, **changes):
    """A random model whose layers' matrices have zeros."""
    changes = CHANGES[name] | changes
    tensors = tiny_hf.random_tensors(name, **changes)
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            tensor[np.abs(tensor) < 0.2] = 0
        if key.endswith("embed_tokens.weight"):  # MaxText's tied head is bfloat16
            tensor[:] = tensor.astype(ml_dtypes.bfloat16)
    return tiny_hf.save(folder, tiny_hf.config_json(name, **changes), tensors)


def handed_folder(name, folder):
    """`pruned_folder`; its Llama as `jaxprune shrink` halves it."""
    if name != "llama":
        return pruned_folder(name, folder)
    larger = pruned_folder(name, folder.with_name("larger"))
    halves = ("--ffn", "0.5", "--heads", "0.5", "--speed-rounds", "0")
    assert cli.main(["shrink", str(larger), str(folder), *halves]) == 0
    return folder
