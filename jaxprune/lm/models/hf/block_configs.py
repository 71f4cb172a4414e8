"""Sizes layer by layer in config.json: `block_configs`, as DeciLM writes them.

transformers has no such attribute. DeciLM's (in vLLM, mlx-lm and llama.cpp's converter)
says for each layer how many query heads share a key head, and the neurons; ModelOpt's
Puzzletron says the number of key heads. Both are written, and the number of query heads
too, which is one for all layers there. What a layer does not have is a "no_op".
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.lm.models.decoder.config import DecoderConfig, LayerSizes
from jaxprune.lm.models.hf.config_reader import Attributes

NAME = "block_configs"
"""The attribute of config.json."""


def read_layer_sizes(
    a: Attributes, fields: Mapping[str, Any]
) -> tuple[LayerSizes, ...]:
    """The sizes of each layer that config.json says.

    Args:
      a: attributes of the config.json.
      fields: fields of the shape that were read from it.

    Returns:
      Sizes of each layer; () where it says one for all.
    """
    blocks, layers = a.raw(NAME), fields["layers"]
    if blocks is None:
        return ()
    objects = isinstance(blocks, list) and all(isinstance(b, dict) for b in blocks)
    if not objects or len(blocks) != layers:
        a.wrong(NAME, f"a list of {layers} objects, one a layer", blocks)
        return ()
    sizes = []
    for i, block in enumerate(blocks):
        inner = Attributes(block, prefix=f"{NAME}[{i}].")
        attention, ffn = inner.within("attention"), inner.within("ffn")
        heads, kv_heads = _heads(attention, fields)
        neurons = 0 if _absent(ffn) else ffn.size("intermediate_size")
        sizes.append(LayerSizes(heads, kv_heads, neurons))
        for part in (attention, ffn, inner):
            part.rest(only={"replace_with_linear": False})
            a.problems += part.problems
    return tuple(sizes)


def block_configs(shape: DecoderConfig) -> list[dict[str, Any]]:
    """The attribute that says the sizes of each layer.

    Args:
      shape: shape of a model.

    Returns:
      An object for each layer, JSON-able.

    Example:
      >>> shape = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> block_configs(shape)[0]["ffn"]
      {'no_op': False, 'intermediate_size': 32}
    """
    return [_block(shape.sizes(layer)) for layer in range(shape.layers)]


def layer_sizes_of(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], layer: int
) -> dict[str, int]:
    """The sizes of a layer by the shapes of its leaves.

    Args:
      config: shape of the model before units were removed.
      shapes: leaf name to its shape now.
      layer: number of the layer.

    Returns:
      "heads", "kv_heads" and "mlp_width"; "experts" where it has some.
    """
    attention = f"layers/{layer}/attention"
    none = (0, 0)  # of a layer without attention, or without an MLP
    heads = shapes.get(f"{attention}/out/kernel", none)[0] // config.head_dim
    if config.fused:
        qkv = shapes.get(f"{attention}/qkv/kernel", none)[1]
        kv_heads = (qkv // config.head_dim - heads) // 2
    else:
        kv_heads = shapes.get(f"{attention}/k/kernel", none)[1] // config.head_dim
    # [experts,] in, out.
    *experts, mlp_width, _ = shapes.get(f"layers/{layer}/mlp/down/kernel", none)
    sizes = {"heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
    return {**sizes, "experts": experts[0]} if experts else sizes


def _block(sizes: LayerSizes) -> dict[str, Any]:
    attention: dict[str, Any] = {"no_op": not sizes.heads}
    if sizes.heads:
        attention["n_heads_in_group"] = sizes.heads // sizes.kv_heads
        attention["num_attention_heads"] = sizes.heads
        attention["num_key_value_heads"] = sizes.kv_heads
    ffn: dict[str, Any] = {"no_op": not sizes.mlp_width}
    if sizes.mlp_width:
        ffn["intermediate_size"] = sizes.mlp_width
    return {"attention": attention, "ffn": ffn}


def _heads(a: Attributes, fields: Mapping[str, Any]) -> tuple[int, int]:
    """The query and key heads of a layer."""
    if _absent(a):
        return 0, 0
    heads = a.size("num_attention_heads", fields["heads"])
    shared = a.size("n_heads_in_group", max(1, heads // fields["kv_heads"]))
    kv_heads = a.size("num_key_value_heads", max(1, heads // shared))
    if kv_heads * shared != heads:
        a.wrong("n_heads_in_group", f"{heads} / {kv_heads}, heads by key heads", shared)
        return 1, 1
    return heads, kv_heads


def _absent(a: Attributes) -> bool:
    return a.flag("no_op", False)
