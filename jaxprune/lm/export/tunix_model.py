"""A model's directory as Tunix's own model, ready for its trainers.

Tunix reads safetensors by itself; what it lacks is the shape of a model that is none of
its presets, as a shrunk one is. Nothing is written: the directory stays what it is.
"""

import importlib
import os
from typing import Any, NamedTuple

import jax

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.export.trainer_shape import TrainerShape, check_trainer_shape
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig


class _Family(NamedTuple):
    """Tunix's modules of a family, and its words for a configuration."""

    model: str
    loader: str
    vocabulary: str = "vocab_size"
    tied: str = ""


_FAMILIES = {
    "llama": _Family("llama3.model", "llama3.params", tied="weight_tying"),
    "qwen3": _Family("qwen3.model", "qwen3.params", tied="use_tied_embedding"),
    "gemma3_text": _Family("gemma3.model", "gemma3.params_safetensors", "num_embed"),
}


def load_in_tunix(
    source: str | os.PathLike[str],
    *,
    dtype: hf.Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> Any:
    """Reads a Llama, Qwen 3 or Gemma 3 as Tunix's own NNX model.

    A pruned model keeps its zeros, and a shrunk one its sizes: the masks of its
    parameters are `jp.masks.above(jp.scores.magnitude(params), 0.0)`.

    Args:
      source: directory of the model.
      dtype: dtype of the parameters; as they are stored if None.
      mesh: mesh with Tunix's axes "fsdp" and "tp", which its parameters are split over.
      **options: fields of Tunix's `ModelConfig` that are no sizes, as `remat_config`.

    Returns:
      The `nnx.Module` of Tunix.

    Raises:
      ValueError: Tunix's decoder would compute something else.
      ModuleNotFoundError: the package google-tunix is missing.
    """
    opened = open_directory(source)
    config = hf.load(opened, lazy=True).config
    model_type = opened.config["model_type"]
    shape = check_trainer_shape(model_type, config, "Tunix")
    family = _FAMILIES[model_type]
    check(
        _RULES,
        theta=shape.rope.theta,
        epsilon=config.norm_epsilon,
        gemma=not family.tied,
    )
    # Imported where it is asked for, as few who export have Tunix.
    modules = (
        importlib.import_module(f"tunix.models.{name}")
        for name in (family.model, family.loader)
    )
    model, loader = modules
    sizes = _tunix_sizes(config, family, shape) | options
    return loader.create_model_from_safe_tensors(
        str(opened.path), model.ModelConfig(**sizes), mesh, dtype
    )


def _tunix_sizes(
    config: DecoderConfig, family: _Family, shape: TrainerShape
) -> dict[str, Any]:
    """The fields of Tunix's `ModelConfig` for a model."""
    sizes: dict[str, Any] = {
        "num_layers": config.layers,
        family.vocabulary: config.vocab_size,
        "embed_dim": config.width,
        "hidden_dim": config.mlp_width,
        "num_heads": config.heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.kv_heads,
    }
    if family.tied:  # a Gemma 3 has no head of its own, and one epsilon
        sizes |= {
            family.tied: config.tie_weights,
            "rope_theta": shape.rope.theta,
            "norm_eps": config.norm_epsilon,
        }
        return sizes
    # Without a layer that has a window, its scheme is never asked for.
    local = shape.local_rope or shape.rope
    return sizes | {
        "sliding_window_size": shape.window,
        "local_base_frequency": local.theta,
        "global_base_frequency": shape.rope.theta,
        "global_scale_factor": shape.rope.factor,
    }


_RULES = (
    # Its `ModelConfig` has a rope_theta for these, which its model does not read.
    Rule(
        lambda v: v.gemma or v.theta == 1_000_000,
        "Tunix turns queries and keys of a Llama or Qwen 3 by the base 1000000, "
        "whatever its rope_theta says, but this model by {theta:g}",
        "hand it to MaxText, with export_maxtext",
    ),
    # For a Gemma 3 it has no epsilon at all.
    Rule(
        lambda v: not v.gemma or v.epsilon == 1e-6,
        "Tunix normalises a Gemma 3 with the rms_norm_eps 1e-06, but this model has "
        "{epsilon:g}",
        "hand it to MaxText, with export_maxtext",
    ),
)
