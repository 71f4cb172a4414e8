"""gpt-oss: attention sinks, and experts whose tensors hold all experts of a layer.

Published directories hold the experts as 4-bit blocks (MXFP4), which are refused; saved
again by transformers after `dequantize=True` they are read.
"""

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family, mixtures
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.common_sizes(
        a, head_dim=64, kv_heads=8, epsilon=("rms_norm_eps", 1e-5)
    )
    if not (
        a.within("rope_parameters").present() or a.within("rope_scaling").present()
    ):
        a.wrong("rope_parameters", "given", None)
    if a.raw("quantization_config") is not None:
        way = "absent; load with Mxfp4Config(dequantize=True) in transformers, and save"
        a.wrong("quantization_config", way, "4-bit weights")
    for unused in ("initial_context_length", "experts_per_token"):
        a.raw(unused)  # published twins of other attributes
    return {
        **fields,
        **mixtures.experts(a, "num_local_experts", 128, 4),
        **family.biased(a, default=True),
        "activation": family.activation(a),
        "renormalise": True,
        "mlp_bias": True,
        "experts_fused": True,
        "swiglu_limit": a.number("swiglu_limit", 7.0),
        "swiglu_alpha": a.number("swiglu_alpha", 1.702),
        "norm": "rms_float32",
        "sinks": True,
        "ropes": (rope_config.one(a, fields, theta=150_000.0),),
        "windows": family.alternating(a, family.window(a, 128), 2),
    }


_LAYER = {k: v for k, v in family.LAYER.items() if not k.startswith("mlp/")}
_EXPERTS = "layers.{}.mlp.experts"
GPT_OSS = Family(
    _fields,
    family.modules(family.OUTER, {**_LAYER, "mlp/router": "mlp.router"}),
    parameters={
        "layers/attention/sinks": ("layers.{}.self_attn.sinks", False),
        "layers/mlp/gate_up/kernel": (f"{_EXPERTS}.gate_up_proj", False),
        "layers/mlp/gate_up/bias": (f"{_EXPERTS}.gate_up_proj_bias", False),
        "layers/mlp/down/kernel": (f"{_EXPERTS}.down_proj", False),
        "layers/mlp/down/bias": (f"{_EXPERTS}.down_proj_bias", False),
    },
    resized={"layers": "num_hidden_layers", "experts": "num_local_experts"},
    layer_attributes=family.layer_types,
)
