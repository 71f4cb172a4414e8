"""Small Hugging Face directories, written and read by the safetensors library."""

import json
import struct

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save as save_bytes

INDEX = "model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(path, tensors, metadata=None):
    """Writes one file; the library lays the tensors out."""
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    whole = {name: value.reshape(tensors[name].shape) for name, value in whole.items()}
    path.write_bytes(save_bytes(whole, metadata or {"format": "pt"}))


def load(path):
    """Reads one file; bytes by name, with the library's dtype and shape."""
    return {
        name: (view["dtype"], tuple(view["shape"]), bytes(view["data"]))
        for name, view in safetensors.deserialize(path.read_bytes())
    }


def build(folder, tensors, shards=1, config=None, **files):
    """Makes a directory: tensors spread over shards in turn, config, tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"é": 0}}}')
    (folder / "generation_config.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if shards == 1:
        save(folder / "model.safetensors", tensors)
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save(folder / file, {k: v for k, v in tensors.items() if where[k] == file})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def raw(path, header, data=b""):
    """Writes a file from its header (a dictionary, or text) and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def contents(folder):
    """Every file of a folder: name to bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def normal(seed, *shape, dtype=np.float32):
    """Weights of a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def llama(layers=2, width=16, dtype=np.float32):
    """Tensors named as Llama's, of a few weights."""
    tensors = {
        "model.embed_tokens.weight": normal(1, 32, width, dtype=dtype),
        "model.norm.weight": np.ones(width, dtype),
        "lm_head.weight": normal(2, 32, width, dtype=dtype),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for j, part in enumerate(("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")):
            shape = (width, 2 * width) if "down" in part else (2 * width, width)
            name = f"{prefix}.{part}.weight"
            tensors[name] = normal(10 * i + j + 3, *shape, dtype=dtype)
        tensors[f"{prefix}.input_layernorm.weight"] = np.ones(width, dtype)
    return tensors
