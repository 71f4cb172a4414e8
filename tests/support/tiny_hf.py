"""Tiny random models of every family, by transformers where torch is there.

`CONFIGS` holds a configuration for each feature that a family has: its name, its class
in transformers, and keyword arguments. The vocabulary has 97 tokens and the context 64.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import tiny_families
from tests.support.tiny_families import SMALL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
KINDS = ("sliding", "sliding", "full", "sliding")
GEMMA = {
    **SMALL,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 5,
    "layer_types": [f"{kind}_attention" for kind in KINDS],
    "query_pre_attn_scalar": 24,
}
CONFIGS = {
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 97,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
        },
    ),
    "gpt2-odd": (
        "GPT2",
        {
            "vocab_size": 97,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 40,
            "activation_function": "gelu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("Llama", SMALL),
    "llama-3": (
        "Llama",
        {
            **SMALL,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
        },
    ),
    "llama-linear": (
        "Llama",
        {
            **SMALL,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 4.0,
                "rope_theta": 500.0,
            },
        },
    ),
    "llama-dynamic": (
        "Llama",
        {**SMALL, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama-long": (  # the context of pretraining is that of the model here
        "Llama",
        {
            **SMALL,
            "rope_parameters": {**LONG, "original_max_position_embeddings": 16},
        },
    ),
    "llama-yarn": (
        "Llama",
        {
            **SMALL,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.5,
                "beta_slow": 0.2,
                "truncate": False,
                "mscale": 0.8,
                "mscale_all_dim": 0.4,
            },
        },
    ),
    "qwen3-yarn": (  # as its model card has it
        "Qwen3",
        {
            **SMALL,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 6}),
    "mistral-full": ("Mistral", {**SMALL, "sliding_window": None, "head_dim": 16}),
    "qwen2": (
        "Qwen2",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen2-full": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": (
        "Qwen3",
        {
            **SMALL,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "phi3": ("Phi3", {**SMALL, "sliding_window": 9}),
    "phi3-long": (
        "Phi3",
        {
            **SMALL,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONG,
        },
    ),
    "phi3-partial": (
        "Phi3",
        {
            **SMALL,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                **LONG,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.5, 2.0, 4.0],
            },
        },
    ),
    "phi3-yarn": (  # an older name of its long rope
        "Phi3",
        {
            **SMALL,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                **LONG,
                "rope_type": "yarn",
                "original_max_position_embeddings": 32,  # not looked at
            },
        },
    ),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3-linear": (
        "Gemma3Text",
        {
            **GEMMA,
            "attention_bias": True,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}

CONFIGS |= tiny_families.CONFIGS


def torch_model(name, folder, dtype="float32", layers=None):
    """A random torch model of a configuration, saved to the folder too."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    family, _ = {**CONFIGS, **tiny_families.MIXTURES}[name]
    arguments = config_json(name, layers)
    del arguments["model_type"]
    config = getattr(transformers, f"{family}Config")(**arguments)
    config._attn_implementation = "eager"
    base = family.removesuffix("Text")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, base + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter += 0.2 * torch.randn_like(parameter)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def tokens(batch=2, time=40, seed=0):
    """Random integers (batch, time)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 97, (batch, time)).astype(np.int32)


def torch_logits(model, ids):
    """Float32 logits of a torch model as NumPy."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(np.asarray(ids)).long(), use_cache=False)
    return out.logits.float().numpy()


def edit(folder, **changes):
    """Changes attributes of a folder's config.json; `...` takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))


TYPES = {"GPT2": "gpt2", "Gemma3Text": "gemma3_text", "GPTNeoX": "gpt_neox"}
TYPES |= {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "GptOss": "gpt_oss"}


def config_json(name, layers=None, **changes):
    """What config.json says of a configuration, without transformers.

    Given `layers`, of its first ones alone; `changes` are other attributes.
    """
    family, arguments = {**CONFIGS, **tiny_families.MIXTURES}[name]
    config = {"model_type": TYPES.get(family, family.lower()), **arguments}
    if layers is not None:
        config["n_layer" if family == "GPT2" else "num_hidden_layers"] = layers
        for each in {"layer_types", "no_rope_layers"} & config.keys():
            config[each] = config[each][:layers]
    return config | changes


def random_tensors(name, seed=0, layers=None, **changes):
    """Random float32 tensors of a configuration, by their Hugging Face names."""
    from flax import nnx

    from jaxprune.lm.models import hf
    from jaxprune.lm.models.decoder.model import Decoder
    from jaxprune.lm.models.hf import decoder_config

    config = config_json(name, layers, **changes)
    model = nnx.eval_shape(lambda: Decoder(decoder_config(config), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(model, nnx.Param)
    leaves, structure = jax.tree.flatten(state)
    arrays = [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))
    return dict(hf.tensors(model, config))


def save(folder, config, tensors, file="model.safetensors"):
    """Writes a model's folder."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / file)
    return folder


def random_folder(name, folder, dtype="float32", layers=None, **changes):
    """Writes a folder of random weights, and returns its tensors."""
    tensors = random_tensors(name, layers=layers, **changes)
    tensors = {key: value.astype(jnp.dtype(dtype)) for key, value in tensors.items()}
    save(folder, config_json(name, layers, **changes), tensors)
    return tensors
