"""The families of checkpoints that are read: one file each, and one table of them.

A new family is a file with a `Family` and a line of `FAMILIES`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.arrays.messages import listed
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.families import (
    cohere,
    falcon,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtures,
    olmo2,
    opt,
    phi,
    phi3,
    qwen,
    smollm3,
    starcoder2,
)
from jaxprune.lm.models.hf.families.family import Family as Family
from jaxprune.lm.models.hf.families.mixtures import TWINS as TWINS

__all__ = ["FAMILIES", "Family", "decoder_config", "find_family"]

FAMILIES = {
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "phi": phi.FAMILY,
    "phi3": phi3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "cohere": cohere.COHERE,
    "cohere2": cohere.COHERE2,
    "starcoder2": starcoder2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "opt": opt.FAMILY,
    "falcon": falcon.FAMILY,
    "gpt_oss": gpt_oss.GPT_OSS,
    "mixtral": mixtures.MIXTRAL,
    "qwen2_moe": mixtures.QWEN2_MOE,
    "qwen3_moe": mixtures.QWEN3_MOE,
    "olmoe": mixtures.OLMOE,
}
"""The supported families by `model_type`."""


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Args:
      config: content of the config.json.

    Returns:
      The family that its `model_type` names.

    Raises:
      ValueError: the model type is not supported.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise ValueError(
            "model_type 'gemma3' is the form with images, whose language model lies "
            "inside; save that as model_type 'gemma3_text' "
            "(Gemma3ForCausalLM.from_pretrained, then save_pretrained)"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}; "
            "another family is pruned by magnitude alone, without options that run the "
            "model, such as --calibration and --evaluate"
        )
    return FAMILIES[model_type].of(config)


def without_ignored(config: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """A config.json less the attributes that the caller says do not matter."""
    remaining = dict(config)
    if absent := [
        name for name in dict.fromkeys(ignore) if not _removed(remaining, name)
    ]:
        raise ValueError(
            f"attributes to ignore must be in config.json, but it has no "
            f"{listed(absent)}; it has {listed(config)}"
        )
    return remaining


def _removed(config: dict[str, Any], name: str) -> bool:
    """Removes an attribute, or "outer.inner", one inside an object; was it there?"""
    if name in config:  # a name may have a dot of its own
        del config[name]
        return True
    outer, _, inner = name.partition(".")
    if not isinstance(config.get(outer), dict):
        return False
    config[outer] = dict(config[outer])  # the caller's stays as it is
    return _removed(config[outer], inner)


def decoder_config(
    config: Mapping[str, Any], *, ignore_config: Sequence[str] = ()
) -> DecoderConfig:
    """Reads the config.json of a language model, old or new.

    Args:
      config: content of the config.json.
      ignore_config: attributes that are read as if they were not there.

    Returns:
      The shape, in float32.

    Raises:
      ValueError: the model type is not supported, an attribute is unknown, lacking or
        unsupported (all are named), or two do not fit.

    Example:
      >>> config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024,
      ...           "n_embd": 768, "n_layer": 12, "n_head": 12}
      >>> decoder_config(config).mlp_width
      3072
    """
    config = without_ignored(config, ignore_config)
    return find_family(config).read(config)[0]
