"""What the config.json of Phi-3-vision says, and how its tensors are called.

The tower's shape is not in the published file, which names OpenAI's ViT-L/14-336; a
tower of another size is described by `img_processor.vision_config`, an object with the
names of transformers' `CLIPVisionConfig`, which only this package reads.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.hf.config_reader import IGNORED, ONLY, Attributes
from jaxprune.models.hf.families import FAMILIES
from jaxprune.models.phi3_vision.model import Phi3VisionConfig
from jaxprune.models.phi3_vision.tower import ClipConfig

_TOWER = "openai/clip-vit-large-patch14-336"
_PARTS = "model.vision_embed_tokens."
_OUTER = {
    "separator": "glb_GN",
    "row_end": "sub_GN",
    "project_in": "img_projection.0",
    "project_out": "img_projection.2",
}
_TOWERS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding.weight",
    "position_embedding": "embeddings.position_embedding.weight",
    "norm_embedded": "pre_layrnorm",
    "norm": "post_layernorm",
    "layers/q": "self_attn.q_proj",
    "layers/k": "self_attn.k_proj",
    "layers/v": "self_attn.v_proj",
    "layers/out": "self_attn.out_proj",
    "layers/norm_attention": "layer_norm1",
    "layers/norm_mlp": "layer_norm2",
    "layers/up": "mlp.fc1",
    "layers/down": "mlp.fc2",
}
# Our field of the tower's shape, and theirs.
_SIZES = {
    "image": "image_size",
    "patch": "patch_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
COPIES = {"vision_embed_tokens.wte.weight": "decoder/embedding/embedding"}
"""What some folders hold a second time."""


class Names:
    """The table of names, a `matching.Names`."""

    prefix = "model."
    skipped = (
        r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        r"|vision_embed_tokens\.img_processor\.vision_model\.embeddings\.position_ids"
    )

    def source(self, leaf: str) -> tuple[str, bool]:
        """The tensor of a leaf, and whether its axes are the leaf's reversed.

        Args:
          leaf: a leaf's name, "tower/layers/3/q/kernel".

        Returns:
          Its name, and True if its axes are reversed.
        """
        part, _, inner = leaf.partition("/")
        if part == "decoder":
            return FAMILIES["phi3"].source(inner)
        if part == "tower":
            return _in_tower(inner)
        name = _PARTS + _OUTER[part]
        if inner:
            name += ".bias" if inner == "bias" else ".weight"
        return name, inner == "kernel"


def _in_tower(leaf: str) -> tuple[str, bool]:
    name = _PARTS + "img_processor.vision_model."
    if leaf in _TOWERS:
        return name + _TOWERS[leaf], leaf == "patch_embedding"
    module, kind = leaf.rsplit("/", 1)
    if layer := re.match(r"layers/(\d+)/", module):
        name += f"encoder.layers.{layer[1]}."
        module = "layers/" + module[layer.end() :]
    name += _TOWERS[module] + (".bias" if kind == "bias" else ".weight")
    return name, kind == "kernel"


def vision_config(config: Mapping[str, Any]) -> Phi3VisionConfig:
    """Reads a config.json of `model_type` "phi3_v".

    Args:
      config: the parsed file.

    Returns:
      The shape, in float32.

    Raises:
      ValueError: it is another model, an attribute is unknown, lacking or unsupported
        (all are named), or two do not fit.
    """
    if config.get("model_type") != "phi3_v":
        raise ValueError(
            f"model_type must be phi3_v, got {config.get('model_type')!r}; "
            "jaxprune.models.hf reads language models."
        )
    family, a = FAMILIES["phi3"], Attributes(config)
    fields = family.fields(a)
    tower, skipped = _tower(a)
    _layout(a)
    a.rest(ignored=IGNORED, only={**ONLY, **family.only})
    if a.problems:
        raise ValueError(
            "a phi3_v configuration is refused unless all of it is understood: "
            + "; ".join(a.problems)
            + "."
        )
    return Phi3VisionConfig(
        decoder=DecoderConfig(**fields), tower=ClipConfig(**tower), skipped=skipped
    )


def _layout(a: Attributes) -> None:
    """How pictures become tokens, of which one way is supported."""
    inner = a.within("embd_layer")
    inner.rest(
        only={
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        }
    )
    a.problems += inner.problems


def _tower(a: Attributes) -> tuple[dict[str, Any], int]:
    """Fields of `ClipConfig`, and how many of the last layers are skipped."""
    inner = a.within("img_processor")
    sizes = inner.within("vision_config")
    usual = ClipConfig()
    tower: dict[str, Any] = {
        ours: sizes.size(theirs, getattr(usual, ours))
        for ours, theirs in _SIZES.items()
    }
    known = {name: name for name in ("quick_gelu", "gelu")}
    tower["activation"] = sizes.choice("hidden_act", known, usual.activation)
    tower["norm_epsilon"] = sizes.number("layer_norm_eps", usual.norm_epsilon)
    sizes.rest(ignored=IGNORED)
    layer = inner.raw("layer_idx", -2)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer >= 0:
        inner.wrong("layer_idx", "an integer below 0", layer)
        layer = -2
    tokens = (tower["image"] // tower["patch"] // 2) ** 2
    only = {
        "name": "clip_vision_model",
        "type_feature": "patch",
        "image_dim_out": tower["width"],
        "num_img_tokens": tokens,
    }
    if not sizes.given():
        only["model_name"] = _TOWER
    inner.rest(ignored={"model_name"} if sizes.given() else (), only=only)
    a.problems += inner.problems + sizes.problems
    return tower, -layer - 1
