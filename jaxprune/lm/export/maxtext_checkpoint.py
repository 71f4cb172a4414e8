"""A model's directory as MaxText's checkpoint, for its trainers and its distillation.

Beside the parameters stands what MaxText calls `student_overrides`: the sizes of a
model that is none of its presets, as a shrunk one is. The whole model is in memory
once.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.files import atomic
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.export.maxtext_tensors import maxtext_place, to_maxtext
from jaxprune.lm.export.trainer_shape import TrainerShape, check_trainer_shape
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig

_CHECKPOINT = "0"  # the step's number
_STUDENT = "student.yml"


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
    loaded = hf.load(opened, lazy=True, ignore_config=ignore_config)
    model_type = opened.config["model_type"]
    config = loaded.config
    shape = check_trainer_shape(model_type, config, "MaxText")
    target = atomic.apart(directory, opened.path)
    overrides = _overrides(model_type, config, shape) | {
        "load_parameters_path": str(target / _CHECKPOINT / "items")
    }
    with atomic.staged(
        target, replaceable=_why_not_ours if overwrite else None
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
    return MaxTextResult(target, overrides, _count(params))


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
    stacks: dict[str, list[np.ndarray]] = {}  # path to layers, in order
    params: dict[str, Any] = {}
    # Not all of the directory: buffers of rotary frequencies and copies may lie there.
    origins = [origin.name for origin in loaded.names.values()]
    # Layers one behind the other, so that each stack is in their order.
    for name in sorted(origins, key=_layer_of):
        path, position = maxtext_place(name, config, gemma=gemma)
        converted = to_maxtext(opened.read(name), path, config, gemma=gemma)
        if position is None:
            _put(params, path, converted)
        else:
            stacks.setdefault(path, []).append(converted)
    for path in [*stacks]:
        _put(params, path, np.stack(stacks.pop(path), axis=1))  # (in, layers, ...)
    return params


def _layer_of(name: str) -> int:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


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
    # Others write a file of that name too, and trainers write steps beside it.
    expected = {_STUDENT, _CHECKPOINT}
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if missing := expected - names:
        return f"it has no {listed(sorted(missing))}"
    if foreign := names - expected:
        return f"it also holds {listed(sorted(foreign))}, which is not of an export"
    return None


def _package() -> Any:
    try:
        import orbax.checkpoint as checkpoint
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing MaxText's checkpoint needs the package orbax-checkpoint; "
            "pip install '.[maxtext]'"
        ) from None
    return checkpoint
