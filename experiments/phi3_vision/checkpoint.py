"""Published directories of Phi-3-vision: config.json and tensors by their names.

The tower's shape is not in the published config.json, which names OpenAI's
ViT-L/14-336. A tower of another size is described by `img_processor.vision_config`, an
object with the names of transformers' `CLIPVisionConfig`; only this file reads it.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments.phi3_vision.model import Phi3Vision, Phi3VisionConfig
from experiments.phi3_vision.tower import ClipConfig
from jaxprune.arrays import tree
from jaxprune.arrays.rules import reworded
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf import parameters
from jaxprune.lm.models.hf.config_reader import IGNORED, Attributes
from jaxprune.lm.models.hf.families import family, phi3
from jaxprune.lm.models.hf.families.family import Family, Fields
from jaxprune.lm.models.hf.tensor_names import match_tensors, tensor_source

_PUBLISHED_TOWER = "openai/clip-vit-large-patch14-336"
_PROCESSOR = "preprocessor_config.json"
# Our field of the tower's shape, and theirs.
_SIZES = {
    "image": "image_size",
    "patch": "patch_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
# The supported way in which pictures become tokens.
_LAYOUT = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


def _fields(a: Attributes) -> Fields:
    decoder = phi3.FAMILY.fields(a)
    tower, skipped = _tower(a)
    layout = a.within("embd_layer")
    layout.rest(only=_LAYOUT)
    a.problems += layout.problems
    return {"decoder": decoder, "tower": tower, "skipped": skipped}


def _tower(a: Attributes) -> tuple[Fields, int]:
    """Fields of `ClipConfig`, and how many of the last layers are skipped."""
    inner = a.within("img_processor")
    sizes = inner.within("vision_config")
    usual = ClipConfig()
    tower: Fields = {
        field: sizes.size(attribute, getattr(usual, field))
        for field, attribute in _SIZES.items()
    }
    if tower["layers"] > family.LAYERS:
        sizes.wrong("num_hidden_layers", f"at most {family.LAYERS}", tower["layers"])
    activations = {name: name for name in ("quick_gelu", "gelu")}
    tower["activation"] = sizes.choice("hidden_act", activations, usual.activation)
    tower["norm_epsilon"] = sizes.number("layer_norm_eps", usual.norm_epsilon)
    sizes.rest(ignored=IGNORED)
    layer = inner.raw("layer_idx", -2)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer >= 0:
        inner.wrong("layer_idx", "an integer below 0", layer)
        layer = -2
    only = {
        "name": "clip_vision_model",
        "type_feature": "patch",
        "image_dim_out": tower["width"],
        "num_img_tokens": (tower["image"] // tower["patch"] // 2) ** 2,
    }
    if not sizes.present():
        only["model_name"] = _PUBLISHED_TOWER
    inner.rest(ignored={"model_name"} if sizes.present() else (), only=only)
    a.problems += inner.problems + sizes.problems
    return tower, -layer - 1


def _with_crops(directory: Path, shape: Phi3VisionConfig) -> Phi3VisionConfig:
    """The number of crops is a setting of the processor, where there is one."""
    path = directory / _PROCESSOR
    if not path.is_file():
        return shape
    crops: Any = read_json(path).get("num_crops", shape.crops)
    if isinstance(crops, bool) or not isinstance(crops, int) or crops < 1:
        raise Damaged(f"'{path}' must have a positive num_crops, got {crops!r}")
    return dataclasses.replace(shape, crops=crops)


_PARTS = "vision_embed_tokens."
_TOWER = _PARTS + "img_processor.vision_model."
_EMBEDDED = _TOWER + "embeddings."
_TOWER_LAYER = {
    **family.LAYER,
    "attention/out": "self_attn.out_proj",
    "norm_attention": "layer_norm1",
    "norm_mlp": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
FAMILY = Family(
    _fields,
    {
        **{f"decoder/{ours}": name for ours, name in phi3.FAMILY.modules.items()},
        "project_in": _PARTS + "img_projection.0",
        "project_out": _PARTS + "img_projection.2",
        "tower/norm_embedded": _TOWER + "pre_layrnorm",  # their spelling
        "tower/norm": _TOWER + "post_layernorm",
        **{
            f"tower/layers/{ours}": f"{_TOWER}encoder.layers.{{}}.{name}"
            for ours, name in _TOWER_LAYER.items()
        },
    },
    only=phi3.FAMILY.only,
    parameters={
        "separator": (_PARTS + "glb_GN", False),
        "row_end": (_PARTS + "sub_GN", False),
        "tower/class_embedding": (_EMBEDDED + "class_embedding", False),
        "tower/patch_embedding": (_EMBEDDED + "patch_embedding.weight", True),
        "tower/position_embedding": (_EMBEDDED + "position_embedding.weight", False),
    },
    skipped=(
        r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        r"|vision_embed_tokens\.img_processor\.vision_model\.embeddings\.position_ids"
    ),
    copies={
        "lm_head.weight": "decoder/embedding/embedding",
        "vision_embed_tokens.wte.weight": "decoder/embedding/embedding",
    },
)


class Loaded(NamedTuple):
    """A model that was read from a directory.

    Attributes:
      model: the model.
      config: its shape.
      names: leaf name to the tensor that it came from, for `hf.to_tensors`.
    """

    model: Phi3Vision
    config: Phi3VisionConfig
    names: dict[str, hf.Source]


def vision_config(config: Mapping[str, Any]) -> Phi3VisionConfig:
    """Reads a config.json of `model_type` "phi3_v".

    Args:
      config: content of the config.json.

    Returns:
      The shape, in float32.

    Raises:
      ValueError: it is another model, or an attribute is unknown, lacking or
        unsupported.

    Example:
      >>> config = {"model_type": "phi3_v", "vocab_size": 32, "hidden_size": 8,
      ...           "num_hidden_layers": 1, "num_attention_heads": 2,
      ...           "intermediate_size": 16, "max_position_embeddings": 64}
      >>> vision_config(config).tower.layers
      24
    """
    if config.get("model_type") != "phi3_v":
        raise ValueError(f"model_type must be phi3_v, got {config.get('model_type')!r}")
    fields, _ = FAMILY.read_fields(config)
    return Phi3VisionConfig(
        decoder=DecoderConfig(**fields["decoder"]),
        tower=ClipConfig(**fields["tower"]),
        skipped=fields["skipped"],
    )


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: hf.Dtype | None = None,
    shardings: hf.Shardings | None = None,
    lazy: bool = False,
) -> Loaded:
    """Reads a directory; the arguments are as for `jaxprune.lm.models.hf.load`.

    Raises:
      Unknown: an attribute or a tensor is not understood.
      Damaged: tensors are missing, doubled or of another shape.
    """
    opened = open_directory(directory)
    try:
        shape = vision_config(opened.config)
    except ValueError as error:
        path = opened.path / "config.json"
        raise reworded(error, Unknown, f"'{path}': ") from None
    shape = _with_crops(opened.path, shape)
    shapes = parameters.leaf_shapes(abstract(shape))
    names = match_tensors(opened, FAMILY, shapes)
    shape = shape.with_dtype(dtype or parameters.common_dtype(opened, names))
    place = shardings or parameters.on_one_device
    leaves = [
        parameters.stored_leaf(opened, names[name], size, dtype, place(name, size))
        for name, size in shapes.items()
    ]
    model = parameters.with_leaves(abstract(shape), leaves, lazy=lazy)
    return Loaded(model, shape, names)


def abstract(config: Phi3VisionConfig) -> Any:
    """The model of a shape, with `jax.ShapeDtypeStruct`s for parameters."""
    return nnx.eval_shape(lambda: Phi3Vision(config, rngs=nnx.Rngs(0)))


def tensors(model: Phi3Vision) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor of a new directory."""
    params = nnx.state(model, nnx.Param)
    names = {
        name: tensor_source(FAMILY, name, leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in tree.named_leaves(params).items()
    }
    return hf.to_tensors(names, params)
