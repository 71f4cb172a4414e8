"""A model's directory as MaxText's checkpoint, for its trainers and its distillation.

Beside the parameters stands what MaxText calls `student_overrides`: the sizes of a
model that is none of its presets, as a shrunk one is. Layers are stacked on axis 1, as
MaxText scans over them. The whole model is in memory once.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxprune.files import atomic
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.export.trainer_shape import TrainerShape, check_trainer_shape
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig

_CHECKPOINT = "0"  # the step's number
_STUDENT = "student.yml"
# Hugging Face's names inside a layer, and MaxText's.
_IN_LAYER = {
    "self_attn.q_proj": "self_attention/query/kernel",
    "self_attn.k_proj": "self_attention/key/kernel",
    "self_attn.v_proj": "self_attention/value/kernel",
    "self_attn.o_proj": "self_attention/out/kernel",
    "self_attn.q_norm": "self_attention/query_norm/scale",
    "self_attn.k_norm": "self_attention/key_norm/scale",
    "mlp.gate_proj": "mlp/wi_0/kernel",
    "mlp.up_proj": "mlp/wi_1/kernel",
    "mlp.down_proj": "mlp/wo/kernel",
    "input_layernorm": "pre_self_attention_layer_norm/scale",
    "post_attention_layernorm": "post_self_attention_layer_norm/scale",
}
_GEMMA_NORMS = {
    "input_layernorm": "pre_self_attention_norm/scale",
    "post_attention_layernorm": "post_self_attention_norm/scale",
    "pre_feedforward_layernorm": "pre_ffw_norm/scale",
    "post_feedforward_layernorm": "post_ffw_norm/scale",
}
_OUTSIDE = {
    "embed_tokens": "token_embedder/embedding",
    "norm": "decoder/decoder_norm/scale",
    "lm_head": "decoder/logits_dense/kernel",
}


class MaxTextResult(NamedTuple):
    """What was written.

    Attributes:
      directory: the directory; "0/items" in it is MaxText's `load_parameters_path`.
      overrides: the entries of `student_overrides` in its student.yml.
      weights: number of weights.
    """

    directory: Path
    overrides: dict[str, Any]
    weights: int


def export_maxtext(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    ignore_config: Sequence[str] = (),
    overwrite: bool = False,
) -> MaxTextResult:
    """Writes a Llama, Qwen 3 or Gemma 3 as MaxText reads it.

    A pruned model keeps its zeros, and a shrunk one its sizes.

    Args:
      source: directory of the model.
      directory: directory to write: an Orbax checkpoint and student.yml.
      ignore_config: attributes of config.json that are not looked at; see `hf.load`.
      overwrite: whether an earlier one may be replaced.

    Returns:
      What was written.

    Raises:
      ValueError: MaxText's decoder would compute something else; nothing was written.
      ModuleNotFoundError: the package orbax-checkpoint is missing.
      OSError: a file could not be written.
    """
    checkpoint = _package()
    opened = open_directory(source)
    model_type = opened.config["model_type"]
    loaded = hf.load(opened, lazy=True, ignore_config=ignore_config)
    config = loaded.config
    shape = check_trainer_shape(model_type, config, "MaxText")
    place = atomic.apart(directory, opened.path)
    overrides = _overrides(model_type, config, shape) | {
        "load_parameters_path": str(place / _CHECKPOINT / "items")
    }
    with atomic.staged(
        place, replaceable=_why_not_ours if overwrite else None
    ) as partial:
        params = _params(opened, loaded, model_type)
        items = checkpoint.PyTreeCheckpointHandler(use_zarr3=True)
        with checkpoint.CheckpointManager(
            partial.absolute(), item_handlers={"items": items}
        ) as manager:
            # The item, and in it Flax's collection of that name.
            tree = {"params": {"params": params}}
            saved = checkpoint.args.PyTreeSave(tree)
            manager.save(0, args=checkpoint.args.Composite(items=saved))
        lines = [f"  {name}: {_yaml(value)}" for name, value in overrides.items()]
        text = "\n".join(["student_overrides:", *lines, ""])
        (partial / _STUDENT).write_text(text, encoding="utf-8")
    return MaxTextResult(place, overrides, _count(params))


def _overrides(
    model_type: str, config: DecoderConfig, shape: TrainerShape
) -> dict[str, Any]:
    """MaxText's attributes for a model."""
    gemma = model_type == "gemma3_text"
    overrides: dict[str, Any] = {
        "override_model_config": True,
        # The scale of a Gemma 3's scores goes by this name.
        "model_name": "gemma3-4b" if gemma else "default",
        "decoder_block": {"llama": "llama2", "qwen3": "qwen3"}.get(
            model_type, "gemma3"
        ),
        "base_num_decoder_layers": config.layers,
        "base_emb_dim": config.width,
        "base_mlp_dim": config.mlp_width,
        "base_num_query_heads": config.heads,
        "base_num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "mlp_activations": ["gelu" if gemma else "silu", "linear"],
        "normalization_layer_epsilon": config.norm_epsilon,
        "logits_via_embedding": config.tie_weights,
        # Its embedding of a Gemma 3 holds the factor that it has at the entry.
        "normalize_embedding_logits": gemma,
        "rope_max_timescale": round(shape.rope.theta),
        "use_qk_norm": config.qk_norm is not None,
        "scan_layers": True,
    }
    if gemma:
        local = shape.local_rope or shape.rope
        overrides |= {
            "use_post_attn_norm": True,
            "use_post_ffw_norm": True,
            "sliding_window_size": shape.window or config.context,
            "local_rope_max_timescale": round(local.theta),
            "rope_linear_scaling_factor": shape.rope.factor,
        }
    return overrides


def _params(
    opened: CheckpointDir, loaded: hf.Loaded, model_type: str
) -> dict[str, Any]:
    """The tree of MaxText's parameters."""
    config, gemma = loaded.config, model_type == "gemma3_text"
    names = _IN_LAYER | (_GEMMA_NORMS if gemma else {})
    stacks: dict[str, list[np.ndarray]] = {}  # path to layers, in order
    params: dict[str, Any] = {}
    # Not all of the directory: buffers of rotary frequencies and copies may lie there.
    origins = [origin.name for origin in loaded.names.values()]
    # Layers one behind the other, so that each stack is in their order.
    for name in sorted(origins, key=_layer_of):
        short = name.removeprefix("model.").removesuffix(".weight")
        tensor = opened.read(name)
        if not (match := re.fullmatch(r"layers\.(\d+)\.(.*)", short)):
            path = _OUTSIDE[short]
            _put(params, path, _converted(tensor, path, config, gemma=gemma))
            continue
        path = (
            f"{_stack_of(int(match[1]), config.layers, gemma=gemma)}/{names[match[2]]}"
        )
        converted = _converted(tensor, path, config, gemma=gemma)
        if "layers_remainder" in path:
            _put(params, path, converted)
        else:
            stacks.setdefault(path, []).append(converted)
    for path in [*stacks]:
        _put(params, path, np.stack(stacks.pop(path), axis=1))  # (in, layers, ...)
    return params


def _layer_of(name: str) -> int:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _stack_of(layer: int, layers: int, *, gemma: bool) -> str:
    """The module of MaxText that a layer belongs to."""
    if not gemma:
        return "decoder/layers"
    period = 6  # MaxText scans over five windows and a layer without, and their like
    whole = layers - layers % period
    if layer < whole:
        return f"decoder/layers/layers_{layer % period}"
    return f"decoder/layers_remainder/layers_{layer - whole}"


def _converted(
    tensor: np.ndarray, path: str, config: DecoderConfig, *, gemma: bool
) -> np.ndarray:
    """A tensor as MaxText has it: inputs first, heads apart."""
    if path.endswith("/scale"):
        # A Gemma's norm scales by 1 + w in its files, by w in MaxText.
        return (tensor + np.asarray(1, tensor.dtype)) if gemma else tensor
    if path.endswith("/embedding"):
        factor = ml_dtypes.bfloat16(math.sqrt(config.width))
        return (tensor * factor).astype(tensor.dtype) if gemma else tensor
    # Torch stores (out, in); zeros stay zeros through all that follows.
    kernel = np.ascontiguousarray(tensor.T)  # (in, out)
    part = path.split("/")[-2]
    if part == "out":
        # (heads, size, width)
        return kernel.reshape(config.heads, config.head_dim, config.width)
    if part not in ("query", "key", "value"):
        return kernel
    heads = config.heads if part == "query" else config.kv_heads
    if part == "query" and config.qk_norm is None:
        # Its Llama has the scale of the scores in this kernel.
        scale = np.float32(1 / math.sqrt(config.head_dim))
        kernel = (kernel.astype(np.float32) * scale).astype(tensor.dtype)
    return kernel.reshape(config.width, heads, config.head_dim)  # (width, heads, size)


def _put(params: dict[str, Any], path: str, value: np.ndarray) -> None:
    *modules, leaf = path.split("/")
    for module in modules:
        params = params.setdefault(module, {})
    params[leaf] = value


def _count(params: Any) -> int:
    """The number of weights of a tree."""
    if isinstance(params, dict):
        return sum(map(_count, params.values()))
    return int(params.size)


def _yaml(value: Any) -> str:
    """A value as YAML reads it: JSON, but for 1e-06, which YAML takes for a word."""
    text = json.dumps(value)
    is_word = isinstance(value, float) and "e" in text and "." not in text
    return text.replace("e", ".0e") if is_word else text


def _why_not_ours(path: Path) -> str | None:
    """Why a directory must not be replaced: only an earlier export may be."""
    return None if (path / _STUDENT).is_file() else f"it has no {_STUDENT}"


def _package() -> Any:
    try:
        import orbax.checkpoint as checkpoint
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing MaxText's checkpoint needs the package orbax-checkpoint; "
            "pip install 'jaxprune[maxtext]'"
        ) from None
    return checkpoint
