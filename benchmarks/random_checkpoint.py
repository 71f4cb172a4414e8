"""Directories with the shapes of published models, and weights drawn at random.

Seconds and bytes of pruning do not depend on the weights; quality does, so it is not
measured on these.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxprune.files import safetensors_file


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, neurons, features of the keys, tokens."""

    layers: int
    width: int
    ffn: int
    keys: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[str, int, int]]:
        """Name, inputs and outputs of a layer's matrices."""
        w, f, k = self.width, self.ffn, self.keys  # features of each side of a matrix
        return [
            ("self_attn.q_proj", w, w),
            ("self_attn.k_proj", w, k),
            ("self_attn.v_proj", w, k),
            ("self_attn.o_proj", w, w),
            ("mlp.gate_proj", w, f),
            ("mlp.up_proj", w, f),
            ("mlp.down_proj", f, w),
        ]

    @property
    def weights(self) -> int:
        """Of a layer."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)


SHAPES = {
    "7 B": Shape(32, 4096, 11008, 4096, 32000),
    "70 B": Shape(80, 8192, 28672, 1024, 32000),
    "405 B": Shape(126, 16384, 53248, 1024, 128256),
}


class Checkpoint(NamedTuple):
    """config.json of a directory, and the shape of each tensor as it is stored."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def llama(shape: Shape, layers: int) -> Checkpoint:
    """A Llama of so many layers."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": shape.ffn,
        # Heads of 128 features in all three sizes.
        "num_attention_heads": shape.width // 128,
        "num_key_value_heads": shape.keys // 128,
    }
    return _decoder(config, layers, shape.width, shape.vocabulary, shape.matrices, {})


def mixture(layers: int, experts: int = 128, width: int = 2048) -> Checkpoint:
    """Qwen3 30B A3B of so many layers; its vocabulary is cut to 32,000 tokens."""
    head, ffn = 128, 768
    # 32 query heads and 4 key heads of 128 at a width of 2048; more features than the
    # width.
    queries, keys = 2 * width, max(width // 4, head)
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": head,
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "intermediate_size": ffn,
        "moe_intermediate_size": ffn,
        "norm_topk_prob": True,
    }
    matrices = [
        ("self_attn.q_proj", width, queries),
        ("self_attn.k_proj", width, keys),
        ("self_attn.v_proj", width, keys),
        ("self_attn.o_proj", queries, width),
        ("mlp.gate", width, experts),
    ]
    for number in range(experts):
        expert = f"mlp.experts.{number}"
        matrices += [
            (f"{expert}.{name}", width, ffn) for name in ("gate_proj", "up_proj")
        ]
        matrices.append((f"{expert}.down_proj", ffn, width))
    vectors = {"self_attn.q_norm": head, "self_attn.k_norm": head}
    return _decoder(config, layers, width, 32000, matrices, vectors)


def _decoder(
    config: dict[str, Any],
    layers: int,
    width: int,
    vocabulary: int,
    matrices: Sequence[tuple[str, int, int]],
    vectors: dict[str, int],
) -> Checkpoint:
    """A decoder with these matrices (name, inputs, outputs) and norms in each layer."""
    config |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    vectors = vectors | dict.fromkeys(norms, width)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, inputs, outputs in matrices:
            # torch stores linear layers so.
            shapes[f"{layer}.{name}.weight"] = (outputs, inputs)
        shapes |= {f"{layer}.{name}.weight": (n,) for name, n in vectors.items()}
    shapes["model.embed_tokens.weight"] = (vocabulary, width)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocabulary, width)
    return Checkpoint(config, shapes)


def write(folder: Path, model: Checkpoint) -> None:
    """Writes config.json and model.safetensors, a tensor in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    rng = np.random.default_rng(0)

    def drawn(name: str) -> np.ndarray:
        size = model.shapes[name]
        if len(size) == 1:
            return np.ones(size, ml_dtypes.bfloat16)  # gains of normalisations
        values = rng.standard_normal(size, np.float32)
        # In place: two float32 copies of the embedding would be a gigabyte.
        values *= 0.02
        return values.astype(ml_dtypes.bfloat16)

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    entries = {name: (bfloat16, shape) for name, shape in model.shapes.items()}
    safetensors_file.write(
        folder / "model.safetensors", entries, drawn, {"format": "pt"}
    )
