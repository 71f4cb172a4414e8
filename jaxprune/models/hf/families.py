"""The seven families: what their config.json says and how their tensors are called.

A family is a row of a table: a function that takes its configuration's attributes and
gives `DecoderConfig`'s fields, the attributes that are supported at one value only, and
the names of its modules by ours. An attribute that no row reads is refused by name.
Defaults are those of the Hugging Face classes, whose files may leave them out.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.hf import rope_config
from jaxprune.models.hf.config_reader import IGNORED, ONLY, Attributes

Fields = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SLIDING = {"full_attention": False, "sliding_attention": True}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
      fields: attributes to fields of `DecoderConfig`.
      modules: our module to theirs; those of a layer begin with "layers/".
      only: attributes that are supported at this value alone.
      prefix: what the names begin with, except the head's; base models leave it out.
      transposed: whether their kernels are [out, in].
      skipped: names of tensors that hold nothing learned.
    """

    fields: Callable[[Attributes], Fields]
    modules: Mapping[str, str]
    only: Mapping[str, Any]
    prefix: str = "model."
    transposed: bool = True
    skipped: str = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

    def source(self, leaf: str) -> tuple[str, bool]:
        """The tensor of a leaf, and whether it lies transposed.

        Args:
          leaf: a leaf's name, "layers/3/attention/q/kernel".

        Returns:
          Its name, "model.layers.3.self_attn.q_proj.weight", and True if its axes
          are the kernel's reversed.
        """
        module, kind = leaf.rsplit("/", 1)
        layer = re.match(r"layers/(\d+)/", module)
        theirs = self.modules[re.sub(r"^layers/\d+/", "layers/", module)]
        if layer is not None:
            theirs = theirs.format(layer[1])
        name = theirs + (".bias" if kind == "bias" else ".weight")
        prefix = "" if module == "head" else self.prefix
        transposed = self.transposed or module == "head"
        return prefix + name, kind == "kernel" and transposed


def decoder_config(config: Mapping[str, Any]) -> tuple[DecoderConfig, Family]:
    """Reads a Hugging Face config.json, old or new.

    Args:
      config: the parsed file.

    Returns:
      The shape, in float32, and the row of the family.

    Raises:
      ValueError: the model type is not supported, an attribute is unknown, lacking or
        unsupported (all are named), or two do not fit.

    Example:
      >>> config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024,
      ...           "n_embd": 768, "n_layer": 12, "n_head": 12}
      >>> decoder_config(config)[0].mlp_width
      3072
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        raise ValueError(
            "model_type 'gemma3' is the form with images, whose language model lies "
            "inside; save that as model_type 'gemma3_text' "
            "(Gemma3ForCausalLM.from_pretrained, then save_pretrained)."
        )
    if kind == "phi3_v":
        raise ValueError(
            "model_type 'phi3_v' sees pictures; "
            "jaxprune.models.hf.loading_vision reads it."
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {kind!r}."
        )
    family, attributes = FAMILIES[kind], Attributes(config)
    fields = family.fields(attributes)
    attributes.rest(ignored=IGNORED, only={**ONLY, **family.only})
    if attributes.problems:
        raise ValueError(
            f"a {kind} configuration is refused unless all of it is understood: "
            + "; ".join(attributes.problems)
            + "."
        )
    return DecoderConfig(**fields), family


def _sizes(a: Attributes, *, head_dim: int | None = None, tied: bool = False) -> Fields:
    """What all families but GPT-2 write alike."""
    width, heads = a.size("hidden_size"), a.size("num_attention_heads")
    return {
        "vocab_size": a.size("vocab_size"),
        "context": a.size("max_position_embeddings"),
        "layers": a.size("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": a.size("num_key_value_heads", heads),
        "head_dim": a.size("head_dim", head_dim or width // heads),
        "mlp_width": a.size("intermediate_size"),
        "norm_epsilon": a.number("rms_norm_eps", 1e-6),
        "tie_weights": a.flag("tie_word_embeddings", tied),
    }


def _llama(a: Attributes) -> Fields:
    fields = _sizes(a)
    bias = a.flag("attention_bias", False)
    return {
        **fields,
        "activation": a.choice("hidden_act", _ACTIVATIONS, "silu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": a.flag("mlp_bias", False),
        "ropes": (rope_config.one(a, fields),),
    }


def _mistral(a: Attributes) -> Fields:
    fields = _sizes(a)
    return {
        **fields,
        "activation": a.choice("hidden_act", _ACTIVATIONS, "silu"),
        "ropes": (rope_config.one(a, fields),),
        "windows": (_window(a, 4096),) * fields["layers"],
    }


def _qwen2(a: Attributes) -> Fields:
    fields = _sizes(a)
    return {
        **fields,
        "activation": a.choice("hidden_act", _ACTIVATIONS, "silu"),
        "qkv_bias": True,
        "ropes": (rope_config.one(a, fields),),
        "windows": _qwen_windows(a, fields["layers"]),
    }


def _qwen3(a: Attributes) -> Fields:
    fields = _sizes(a, head_dim=128)
    bias = a.flag("attention_bias", False)
    return {
        **fields,
        "activation": a.choice("hidden_act", _ACTIVATIONS, "silu"),
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "ropes": (rope_config.one(a, fields),),
        "windows": _qwen_windows(a, fields["layers"]),
    }


def _phi3(a: Attributes) -> Fields:
    fields = _sizes(a)
    return {
        **fields,
        "norm_epsilon": a.number("rms_norm_eps", 1e-5),
        "activation": a.choice("hidden_act", _ACTIVATIONS, "silu"),
        "fused": True,
        "ropes": (rope_config.one(a, fields),),
        "windows": (_window(a, None),) * fields["layers"],
    }


def _gemma3(a: Attributes) -> Fields:
    fields = _sizes(a, head_dim=256, tied=True)
    layers, bias = fields["layers"], a.flag("attention_bias", False)
    window = _window(a, 4096)
    every = a.size("_sliding_window_pattern", a.size("sliding_window_pattern", 6))
    sliding = _layer_types(a, [bool((i + 1) % every) for i in range(layers)])
    if any(sliding) and window is None:
        a.wrong("sliding_window", "given where layers slide", None)
    return {
        **fields,
        "norm": "rms_plus_one",
        "qk_norm": True,
        "post_norms": True,
        "activation": a.choice("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": math.sqrt(fields["width"]),
        "attention_scale": a.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": a.optional("final_logit_softcapping"),
        "ropes": rope_config.full_and_sliding(a, fields),
        "rope_of": tuple(int(slides) for slides in sliding),
        "windows": tuple(window if slides else None for slides in sliding),
    }


def _gpt2(a: Attributes) -> Fields:
    width, heads, context = a.size("n_embd"), a.size("n_head"), a.size("n_positions")
    if width % heads:
        a.wrong("n_embd", f"divisible by n_head={heads}", width)
    if a.size("n_ctx", context) != context:
        a.wrong("n_ctx", f"n_positions={context}", a.size("n_ctx", context))
    return {
        "vocab_size": a.size("vocab_size"),
        "context": context,
        "layers": a.size("n_layer"),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": max(1, width // heads),
        "mlp_width": a.size("n_inner", 4 * width),
        "norm": "layer",
        "norm_epsilon": a.number("layer_norm_epsilon", 1e-5),
        "activation": a.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "gated": False,
        "fused": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_weights": a.flag("tie_word_embeddings", True),
        "attention_scale": None if a.flag("scale_attn_weights", True) else 1.0,
    }


def _window(a: Attributes, default: int | None) -> int | None:
    """null says that a token sees all."""
    given = a.raw("sliding_window", default)
    return None if given is None else a.size("sliding_window", default)


def _qwen_windows(a: Attributes, layers: int) -> tuple[int | None, ...]:
    used, window = a.flag("use_sliding_window", False), _window(a, 4096)
    first = a.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        a.wrong("max_window_layers", "an integer >= 0", first)
        first = layers
    window = window if used else None
    slides = [window is not None and i >= first for i in range(layers)]
    sliding = _layer_types(a, slides)
    if any(sliding) and window is None:
        a.wrong("use_sliding_window", "true where layer_types slide", used)
    return tuple(window if slide else None for slide in sliding)


def _layer_types(a: Attributes, default: list[bool]) -> list[bool]:
    """Which layers slide."""
    given = a.raw("layer_types")
    if given is None:
        return default
    if not isinstance(given, list) or not all(
        isinstance(kind, str) and kind in _SLIDING for kind in given
    ):
        a.wrong("layer_types", f"a list of {' and '.join(_SLIDING)}", given)
        return default
    if len(given) != len(default):
        a.wrong("layer_types", f"{len(default)} long, one a layer", len(given))
        return default
    return [_SLIDING[kind] for kind in given]


_OUTER = {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}
_LAYER = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/norm_q": "self_attn.q_norm",
    "attention/norm_k": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}
_FUSED = {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
_SANDWICH = {
    "norm_attended": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_added": "post_feedforward_layernorm",
}
_GPT2_LAYER = {
    "attention/qkv": "attn.c_attn",
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
    "norm_attention": "ln_1",
    "norm_mlp": "ln_2",
}
_GPT2_OUTER = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
}


def _modules(
    outer: Mapping[str, str], layer: Mapping[str, str], place: str = "layers"
) -> dict[str, str]:
    inner = {f"layers/{ours}": f"{place}.{{}}.{n}" for ours, n in layer.items()}
    return {**outer, **inner}


FAMILIES = {
    "gpt2": Family(
        _gpt2,
        _modules(_GPT2_OUTER, _GPT2_LAYER, "h"),
        only={"scale_attn_by_inverse_layer_idx": False},
        prefix="transformer.",
        transposed=False,
        skipped=r"h\.\d+\.attn\.(masked_)?bias",
    ),
    "llama": Family(_llama, _modules(_OUTER, _LAYER), only={}),
    "mistral": Family(_mistral, _modules(_OUTER, _LAYER), only={}),
    "qwen2": Family(_qwen2, _modules(_OUTER, _LAYER), only={"use_mrope": False}),
    "qwen3": Family(_qwen3, _modules(_OUTER, _LAYER), only={"use_mrope": False}),
    "phi3": Family(
        _phi3,
        _modules(_OUTER, {**_LAYER, **_FUSED}),
        only={
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
        },
    ),
    "gemma3_text": Family(
        _gemma3,
        _modules(_OUTER, {**_LAYER, **_SANDWICH}),
        only={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
}
"""The supported families by `model_type`."""
