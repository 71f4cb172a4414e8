"""A model with fewer tokens, layers, experts, heads, neurons: a directory.

What parameters became smaller decides what config.json says (`smaller_config`): all
layers must have the same sizes, since that is what a configuration can hold.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxprune.arrays import lazy, rules, tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import Rule
from jaxprune.lm.checkpoints import new_weights
from jaxprune.lm.checkpoints.checkpoint_dir import CONFIG, open_directory
from jaxprune.lm.checkpoints.directory_writer import Finish
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf import families
from jaxprune.lm.models.hf.loading import abstract
from jaxprune.lm.models.hf.parameters import leaf_shapes
from jaxprune.lm.models.hf.smaller_config import smaller_config
from jaxprune.lm.models.hf.smaller_tensors import name_before, new_tensors
from jaxprune.lm.models.hf.tensor_names import Source

EMBEDDING = "embedding/embedding"
"""Leaf with a row for each token, (vocab_size, width)."""

_SIZES = (
    Rule(
        lambda v: v.first == v.size,
        "a configuration can only say layers of one size, but layer 0 has {first} and "
        "layer {layer} {size}",
        "remove as many units of each",
    ),
    Rule(
        lambda v: v.kv_heads and v.heads % v.kv_heads == 0,
        "a configuration can only say key heads that serve as many query heads each, "
        "but {heads} query and {kv_heads} key heads are left",
        "remove as many query heads of each key head",
    ),
)


def keep_layers(
    config: DecoderConfig, params: Any, kept: Sequence[int]
) -> tuple[DecoderConfig, Any]:
    """A decoder with some of its layers only.

    Args:
      config: shape of the decoder.
      params: parameters of it, arrays or lazy ones.
      kept: numbers of the layers that stay, ascending.

    Returns:
      The smaller shape and its parameters, in the containers of its model.

    Raises:
      ValueError: no layers are kept, or they are not ascending numbers of layers.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> from jaxprune.lm.models.decoder.rope import linear
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=3, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, ropes=(linear(1e4, 8),),
      ... )
      >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> small, params = keep_layers(config, params, [0, 2])
      >>> small.layers, len(params["layers"])
      (2, 2)
    """
    kept = list(kept)
    last = config.layers - 1
    if not (kept and kept == sorted({*kept} & {*range(last + 1)})):
        raise ValueError(
            f"kept layers must be ascending numbers from 0 to {last}, at least one, "
            f"got {kept}"
        )
    small = dataclasses.replace(
        config,
        layers=len(kept),
        rope_of=tuple(config.rope_of[i] for i in kept) if config.rope_of else (),
        windows=tuple(config.windows[i] for i in kept) if config.windows else (),
    )
    named = tree.named_leaves(params)
    model = abstract(small)
    leaves = [named[name_before(name, kept)] for name in leaf_shapes(model)]
    return small, jax.tree.unflatten(jax.tree.structure(_state(model)), leaves)


def keep_experts(
    config: DecoderConfig, params: Any, kept: Sequence[Sequence[int]]
) -> tuple[DecoderConfig, Any]:
    """A decoder with some of the experts of each layer only.

    Args:
      config: shape of the decoder.
      params: parameters of it, arrays or lazy ones; the experts' are read.
      kept: numbers of the experts that stay, ascending, as many for each layer.

    Returns:
      The smaller shape and its parameters.

    Raises:
      ValueError: the layers do not keep as many ascending numbers of experts each, or
        fewer than a token is given to.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=2, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, experts=4, experts_per_token=2,
      ... )
      >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> small, params = keep_experts(config, params, [[0, 3], [1, 2]])
      >>> small.experts, params["layers"][0]["mlp"]["down"]["kernel"].shape
      (2, (2, 32, 16))
    """
    sizes = {len(experts) for experts in kept}
    fits = all(
        [*experts] == sorted({*experts} & {*range(config.experts)}) for experts in kept
    )
    if not (fits and len(kept) == config.layers and (len(sizes) == 1)):
        raise ValueError(
            "kept experts must be as many ascending numbers from 0 to "
            f"{config.experts - 1} for each of the {config.layers} layers, got "
            f"{[list(experts) for experts in kept]}"
        )
    if not min(sizes, default=0) >= config.experts_per_token:
        raise ValueError(
            f"each token is given to {config.experts_per_token} experts, so as many "
            f"must stay, got {min(sizes, default=0)}; keep more"
        )
    (remaining,) = sizes

    def cut(name: str, leaf: Any) -> Any:
        match = re.match(r"layers/(\d+)/mlp/(router|gate_up|gate|up|down)/", name)
        if match is None:
            return leaf
        experts = np.asarray(kept[int(match[1])])
        outputs = match[2] == "router"  # its outputs are the experts
        return lazy.array(leaf)[..., experts] if outputs else lazy.array(leaf)[experts]

    named = tree.named_leaves(params)
    leaves = [cut(name, leaf) for name, leaf in named.items()]
    small = dataclasses.replace(config, experts=remaining)
    return small, jax.tree.unflatten(jax.tree.structure(params), leaves)


def keep_tokens(
    config: DecoderConfig, params: Any, kept: Int[np.ndarray, " size"]
) -> tuple[DecoderConfig, Any]:
    """A decoder that knows some of its tokens only.

    Args:
      config: shape of the decoder.
      params: parameters of it, arrays or lazy ones; those of tokens are read.
      kept: ids of the tokens that stay, ascending; the place of each is its new id.

    Returns:
      The smaller shape and its parameters.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=2, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> small, params = keep_tokens(config, params, np.arange(0, 64, 2))
      >>> small.vocab_size, params["embedding"]["embedding"].shape
      (32, (32, 16))
    """
    small = dataclasses.replace(config, vocab_size=len(kept))
    axes = changed_axes(config, small)
    leaves = [
        jnp.take(lazy.array(leaf), kept, axes[name]) if name in axes else leaf
        for name, leaf in tree.named_leaves(params).items()
    ]
    return small, jax.tree.unflatten(jax.tree.structure(params), leaves)


def changed_axes(before: DecoderConfig, after: DecoderConfig) -> dict[str, int]:
    """The axis that becomes smaller of each leaf that has one.

    Args:
      before: shape of a decoder.
      after: shape of the same decoder with fewer tokens.

    Returns:
      Leaf name to axis.
    """
    shapes = leaf_shapes(abstract(after))
    return {
        leaf: next(i for i, n in enumerate(shape) if n != shapes[leaf][i])
        for leaf, shape in leaf_shapes(abstract(before)).items()
        if shape != shapes[leaf]
    }


def resized(config: DecoderConfig, params: Any) -> DecoderConfig:
    """The shape of a decoder whose heads or MLPs became smaller.

    Args:
      config: shape of the decoder before.
      params: parameters that it has now.

    Returns:
      The shape with other `vocab_size`, `experts`, `heads`, `kv_heads` and `mlp_width`.

    Raises:
      ValueError: layers have different sizes, or no such decoder has the shapes of the
        parameters.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> from jaxprune.lm.models.decoder.rope import linear
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=3, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, ropes=(linear(1e4, 8),),
      ... )
      >>> small = dataclasses.replace(config, mlp_width=12, heads=2)
      >>> params = nnx.state(Decoder(small, rngs=nnx.Rngs(0)), nnx.Param)
      >>> resized(config, params) == small
      True
    """
    shapes_now = {name: leaf.shape for name, leaf in tree.named_leaves(params).items()}
    sizes = [_layer_sizes(config, shapes_now, layer) for layer in range(config.layers)]
    different = next((i for i, size in enumerate(sizes) if size != sizes[0]), 0)
    rules.check(
        _SIZES, layer=different, first=sizes[0], size=sizes[different], **sizes[0]
    )
    new: dict[str, Any] = {"vocab_size": shapes_now[EMBEDDING][0], **sizes[0]}
    small = dataclasses.replace(config, **new)
    expected = leaf_shapes(abstract(small))
    wrong = [name for name in expected if expected[name] != shapes_now.get(name)]
    if wrong:
        raise ValueError(
            "a configuration can only say fewer tokens, layers, experts, heads and "
            f"neurons, but {listed(wrong)} became smaller in another way; leave them "
            "whole"
        )
    return small


def write_smaller(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    params: Any,
    names: Mapping[str, Source],
    *,
    kept: Sequence[int] | None = None,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    ignore_config: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> list[Path]:
    """Writes a smaller decoder as a plain Hugging Face directory.

    Args:
      source: directory that the model was loaded from.
      directory: path of the new one.
      params: smaller parameters, of `jp.shrink`, `keep_tokens`, `keep_layers`,
        `keep_experts` or all of them.
      names: tensor that each leaf came from, as `load` returned it.
      kept: numbers of the layers that stayed, all if left out.
      settings: name of a JSON file to its content, None where it is left out; of
        config.json the one that the sizes are put into. Others are copied.
      ignore_config: attributes of config.json that `load` was told not to look at.
      provenance: facts of how it was made, JSON-able, for jaxprune.json.
      overwrite: whether an earlier result may be replaced.
      finish: function that is called at the end; see `rewrite.write_directory`.

    Returns:
      The paths of the files.

    Raises:
      ValueError: a configuration cannot say the shapes of the parameters, they have
        other layers than `kept` says, or `directory` is taken.
      OSError: the directory could not be written.
    """
    opened, settings = open_directory(source), dict(settings or {})
    checkpoint_config = settings.pop(CONFIG, None) or opened.config
    config_before = families.decoder_config(opened.config, ignore_config=ignore_config)
    kept = list(range(config_before.layers)) if kept is None else list(kept)
    # The shape by the layers alone; the parameters say the rest.
    fewer_layers, _ = keep_layers(config_before, _state(abstract(config_before)), kept)
    matches = [re.match(r"layers/(\d+)/", name) for name in tree.names(params)]
    layers = {int(match[1]) for match in matches if match}
    if layers != {*range(len(kept))}:
        raise ValueError(
            f"the parameters have {len(layers)} layers, but kept says {len(kept)} of "
            f"{config_before.layers}; give kept= as it was given to keep_layers"
        )
    config_now = resized(fewer_layers, params)
    config = smaller_config(
        checkpoint_config, config_now, kept, ignore_config=ignore_config
    )
    return new_weights.write_new_weights(
        opened,
        directory,
        config,
        new_tensors(opened, params, names, kept),
        provenance=provenance or {},
        settings=settings,
        overwrite=overwrite,
        finish=finish,
    )


def _layer_sizes(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], layer: int
) -> dict[str, int]:
    """Heads, key heads, neurons and experts of a layer by the shapes of its leaves."""
    attention = f"layers/{layer}/attention"
    heads = shapes[f"{attention}/out/kernel"][0] // config.head_dim
    if config.fused:
        qkv = shapes[f"{attention}/qkv/kernel"][1] // config.head_dim
        kv_heads = (qkv - heads) // 2
    else:
        kv_heads = shapes[f"{attention}/k/kernel"][1] // config.head_dim
    # [experts,] in, out.
    *experts, mlp_width, _ = shapes[f"layers/{layer}/mlp/down/kernel"]
    sizes = {"heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
    return {**sizes, "experts": experts[0]} if experts else sizes


def _state(model: Any) -> Any:
    return nnx.state(model, nnx.Param)
