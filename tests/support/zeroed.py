"""Directories whose matrices have zeros, without a pruning."""

import numpy as np
from safetensors.numpy import load_file, save_file


def write_zeros(folder, share, seed=0):
    """Sets this share of each matrix of a layer to zero; the new tensors."""
    rng = np.random.default_rng(seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and (".layers." in name or ".h." in name):
            mask = rng.random(tensor.shape) < share
            tensors[name] = np.where(mask, np.zeros_like(tensor), tensor)
    save_file(tensors, path, {"format": "pt"})
    return tensors
