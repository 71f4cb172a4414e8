"""Small random models of transformers and timm, each with an example input.

The sizes are small so that forty of them run in minutes; the programs are those of the
full architectures: every kind of block is there at least once.
"""

from collections.abc import Callable
from typing import Any

import torch

Made = tuple[Any, Any]
"""A module and what it is called with."""

_TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Encoders and decoders that use these words for their sizes.
_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, **_COMMON, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    **_TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_SPEECH = {
    **_TEXT,
    **_COMMON,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


def _tokens() -> Any:
    return torch.randint(3, 97, (2, 12))


def _text(**settings: Any) -> dict[str, Any]:
    return {"input_ids": _tokens(), **settings}


def _both() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(), "use_cache": False}


def _pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _hidden(**settings: Any) -> dict[str, Any]:
    return {"input_ids": _tokens(), "use_cache": False, **settings}


# Class to sizes, and what makes its example.
TRANSFORMERS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "BertModel": ({**_TEXT, **_COMMON}, _text),
    "RobertaModel": ({**_TEXT, **_COMMON}, _text),
    "ElectraModel": ({**_TEXT, **_COMMON, "embedding_size": 16}, _text),
    "AlbertModel": ({**_TEXT, **_COMMON, "embedding_size": 16}, _text),
    "DebertaV2Model": ({**_TEXT, **_COMMON}, _text),
    "DistilBertModel": (
        {**_TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        _text,
    ),
    "GPT2LMHeadModel": (
        {**_TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        _hidden,
    ),
    "OPTForCausalLM": (
        {
            **_TEXT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
        _hidden,
    ),
    "LlamaForCausalLM": (_DECODER, _hidden),
    "Qwen3ForCausalLM": ({**_DECODER, "head_dim": 8}, _hidden),
    "Gemma3ForCausalLM": ({**_DECODER, "head_dim": 8}, _hidden),
    "Phi3ForCausalLM": (_DECODER, _hidden),
    "MixtralForCausalLM": ({**_DECODER, "num_local_experts": 4}, _hidden),
    "Qwen3MoeForCausalLM": (
        {
            **_DECODER,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        _hidden,
    ),
    "MambaForCausalLM": (
        {**_TEXT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        _hidden,
    ),
    "T5Model": (
        {
            **_TEXT,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
        _both,
    ),
    "BartModel": (_SEQ2SEQ, _both),
    "WhisperModel": (
        {
            **_SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 24,
            "decoder_start_token_id": 1,
        },
        lambda: {
            "input_features": torch.randn(2, 16, 40),
            "decoder_input_ids": _tokens(),
            "use_cache": False,
        },
    ),
    "Wav2Vec2Model": (
        {**_SPEECH, "num_feat_extract_layers": 2},
        lambda: {"input_values": torch.randn(2, 400)},
    ),
    "HubertModel": (
        {**_SPEECH, "num_feat_extract_layers": 2},
        lambda: {"input_values": torch.randn(2, 400)},
    ),
    "ViTModel": (_VISION, _pixels),
    "Dinov2Model": (_VISION, _pixels),
    "SwinModel": (
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
        },
        _pixels,
    ),
    "SegformerModel": (
        {
            "hidden_sizes": [16, 32],
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "num_attention_heads": [2, 4],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        _pixels,
    ),
    "CLIPModel": (
        {
            "text_config": {**_TEXT, **_COMMON},
            "vision_config": _VISION,
            "projection_dim": 24,
        },
        lambda: {**_text(), **_pixels()},
    ),
    "SiglipModel": (
        {"text_config": {**_TEXT, **_COMMON}, "vision_config": _VISION},
        lambda: {**_text(), **_pixels()},
    ),
}
"""Models of transformers: encoders, decoders, mixtures of experts, a state space, text
to text, speech, vision, text and vision."""

TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet26d": {},
    "resnext26ts": {},
    "seresnet18": {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)},
    "regnetx_002": {},
    "regnety_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "efficientnet_lite0": {},
    "efficientnet_b0": {},
    "mnasnet_small": {},
    "ghostnet_050": {},
    "repvgg_a0": {},
    "convnext_atto": {},
    "convnextv2_atto": {"depths": (1, 1, 2, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "cait_xxs24_224": {"img_size": 64, "depth": 2, "depth_token_only": 1},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "depths": (1, 1),
        "num_heads": (2, 4),
        "embed_dim": 32,
    },
    "maxvit_rmlp_pico_rw_256": {
        "img_size": 64,
        "depths": (1, 1),
        "embed_dim": (64, 128),
    },
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "poolformer_s12": {},
    "edgenext_xx_small": {"depths": (1, 1, 2, 1)},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
}
"""Models of timm, with what makes them small; images are 64 by 64."""


def names() -> list[str]:
    """The models, those of transformers first.

    Returns:
      Names for `make`.
    """
    return [*TRANSFORMERS, *TIMM]


def make(name: str) -> Made:
    """A model with random weights from seed 0, in eval mode, and an example.

    Args:
      name: one of `names()`.

    Returns:
      The module and what it is called with.
    """
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        import transformers

        sizes, example = TRANSFORMERS[name]
        model = getattr(transformers, name)
        return model(model.config_class(**sizes)).eval(), example()
    import timm

    model = timm.create_model(name, **{"num_classes": 10, **TIMM[name]})
    with torch.no_grad():
        for parameter in model.parameters():
            # Residual branches and heads that start at nothing would hide any error.
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1)
    return model.eval(), torch.randn(2, 3, 64, 64)
