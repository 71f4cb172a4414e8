"""How one family of checkpoints is read, and what several families have in common.

A family is a value: a function from the attributes of its config.json to the fields of
a model's shape, the attributes that are supported at one value only, and a table of
tensor names. An attribute that no family asks for is refused by name. Defaults are
those of the Hugging Face classes, whose files may leave them out.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.arrays.rules import refusal
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import IGNORED, ONLY, Attributes, Problem

Fields = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_SLIDING = {"full_attention": False, "sliding_attention": True}

LAYERS = 10_000
"""More layers than this no model has; config.json is refused before they are built."""
OUTER = {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}
"""Modules outside of the layers, ours to those of Llama and its relatives."""
LAYER = {
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
"""Modules of a layer, likewise."""
RESIZED = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
}
"""Fields of the shape that a smaller model changes, to their attributes."""
WHOLE_HEADS = {"layers": "num_hidden_layers", "mlp_width": "intermediate_size"}
"""The same where heads must stay: their size is the width over their number, say."""
SANDWICH = {
    "norm_attended": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_added": "post_feedforward_layernorm",
}
"""Norms of Gemma's blocks, which stand before and behind attention and MLP."""


def modules(
    outer: Mapping[str, str], layer: Mapping[str, str], layers: str = "layers"
) -> dict[str, str]:
    """The table of modules of a model whose layers are called `layers` there."""
    inner = {f"layers/{module}": f"{layers}.{{}}.{n}" for module, n in layer.items()}
    return {**outer, **inner}


class HeadsRule(NamedTuple):
    """Which numbers of query heads a family's class in transformers accepts.

    Attributes:
      takes: a function of config.json, the width and a number of query heads; returns
        whether the class accepts that number.
      when: the same rule in words, with "{width}" for the width.
    """

    takes: Callable[[Mapping[str, Any], int, int], bool]
    when: str


ANY_HEADS = HeadsRule(lambda config, width, heads: True, "")
DIVIDING_HEADS = HeadsRule(
    lambda config, width, heads: width % heads == 0,
    "its width, {width}, is a multiple of its query heads",
)


def _way_out(problems: Sequence[Problem], ignoring: str) -> str:
    """What to do about attributes: one that is absent cannot be ignored."""
    absent = [p.name for p in problems if p.absent]
    ways = [f"write {', '.join(absent)} into config.json"] if absent else []
    if len(absent) < len(problems):
        ways.append(f"{ignoring} if the model computes the same without it")
    return ", and ".join(ways)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      fields: attributes of config.json to fields of the shape.
      modules: our module to theirs, "{}" for the number of the layer.
      only: attributes that are supported at this value alone.
      parameters: leaves that are no module's kernel, bias, scale or embedding, without
        the number of the layer: to their tensor, and whether its axes are the leaf's
        reversed.
      prefix: beginning of the names, except the head's; base models leave it out.
      stored_out_in: whether kernels are stored [out, in].
      skipped: a pattern of tensors that hold nothing learned.
      copies: tensors, without the prefix, that may repeat a leaf: to that leaf.
      variant: function of a config.json to the modules that have other names by it.
      renamed: other names of tensors, without the prefix: to those of `modules`.
      resized: fields that a smaller model changes, to the attributes that say them.
      layer_attributes: function of a shape to attributes that say how its layers
        differ.
      heads: rule of the numbers of query heads that transformers takes, though a head's
        size is said by itself.
    """

    fields: Callable[[Attributes], Fields]
    modules: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: modules(OUTER, LAYER)
    )
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, tuple[str, bool]] = dataclasses.field(default_factory=dict)
    prefix: str = "model."
    stored_out_in: bool = True
    skipped: str = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    copies: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"lm_head.weight": "embedding/embedding"}
    )
    variant: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda config: {}
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resized: Mapping[str, str] = dataclasses.field(default_factory=lambda: RESIZED)
    layer_attributes: Callable[[Any], Fields] = lambda shape: {}
    heads: HeadsRule = ANY_HEADS

    def read(self, config: Mapping[str, Any]) -> tuple[DecoderConfig, tuple[str, ...]]:
        """The model's shape, in float32, and the attributes that were ignored.

        Raises:
          ValueError: as for `read_fields`, or two attributes do not fit.
        """
        fields, ignored = self.read_fields(config)
        return DecoderConfig(**fields), ignored

    def read_fields(self, config: Mapping[str, Any]) -> tuple[Fields, tuple[str, ...]]:
        """The fields of the model's shape, and the attributes that were ignored.

        Raises:
          ValueError: attributes are unknown, lacking or unsupported; all are named.
        """
        attributes = Attributes(config)
        fields = self.fields(attributes)
        attributes.rest(ignored=IGNORED, only={**ONLY, **self.only})
        if attributes.problems:
            raise refusal(
                f"a {config['model_type']} configuration is refused unless all of it "
                f"is understood: {'; '.join(p.text for p in attributes.problems)}",
                _way_out(attributes.problems, "name an attribute in ignore_config"),
                _way_out(attributes.problems, "give --ignore-config ATTRIBUTE"),
            )
        return fields, tuple(attributes.ignored)

    def of(self, config: Mapping[str, Any]) -> "Family":
        """The family with the names that a config.json asks for."""
        if not (variant := self.variant(config)):
            return self
        return dataclasses.replace(self, modules={**self.modules, **variant})

    def source(self, leaf: str) -> tuple[str, bool]:
        """The tensor of a leaf, and whether its axes are the leaf's reversed.

        A "*" in the name is the number of an expert: the leaf has their tensors as its
        first axis. "layers/3/attention/q/kernel" is
        "model.layers.3.self_attn.q_proj.weight", and reversed where that is [out, in].
        """
        layer = re.search(r"(?<=\blayers/)\d+", leaf)
        number = layer[0] if layer else ""
        # The tables name modules of any layer: without its number.
        anywhere = re.sub(r"(?<=\blayers/)\d+/", "", leaf)
        if anywhere in self.parameters:
            name, reverse = self.parameters[anywhere]
            return self.prefix + name.format(number), reverse
        module, parameter = anywhere.rsplit("/", 1)
        tensor = self.modules[module].format(number)
        head = tensor == "lm_head"  # it has no prefix, in any family
        name = tensor + (".bias" if parameter == "bias" else ".weight")
        reverse = parameter == "kernel" and (self.stored_out_in or head)
        return name if head else self.prefix + name, reverse


def common_sizes(
    a: Attributes,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    tied: bool = False,
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6),
) -> Fields:
    """The fields that most families write alike, by the defaults of a family."""
    width, heads = a.size("hidden_size"), a.size("num_attention_heads")
    named = a.raw("num_key_value_heads", kv_heads)
    return {
        "vocab_size": a.size("vocab_size"),
        "context": a.size("max_position_embeddings"),
        "layers": a.size("num_hidden_layers", most=LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": a.size("num_key_value_heads", heads if named is None else kv_heads),
        "head_dim": a.size("head_dim", head_dim or width // heads),
        "mlp_width": a.size("intermediate_size"),
        "norm_epsilon": a.number(*epsilon),
        "tie_weights": a.flag("tie_word_embeddings", tied),
    }


def activation(a: Attributes, name: str = "hidden_act", default: str = "silu") -> str:
    """The nonlinearity that an attribute names."""
    name_here: str = a.choice(name, _ACTIVATIONS, default)
    return name_here


def like_llama(a: Attributes, *, theta: float = 1e4, **defaults: Any) -> Fields:
    """`common_sizes`, the nonlinearity and one rotary scheme, as Llama has them."""
    fields = common_sizes(a, **defaults)
    return {
        **fields,
        "activation": activation(a),
        "ropes": (rope_config.one(a, fields, theta=theta),),
    }


def biased(a: Attributes, *, mlp: bool = False, default: bool = False) -> Fields:
    """Biases of the attention by `attention_bias`, and of the MLP by `mlp_bias`."""
    bias = a.flag("attention_bias", default)
    fields = {"qkv_bias": bias, "out_bias": bias}
    return {**fields, "mlp_bias": a.flag("mlp_bias", False)} if mlp else fields


def head_size(a: Attributes, width: str, heads: str) -> int:
    """Features of a head where a width is cut into the heads."""
    size, number = a.size(width), a.size(heads)
    if size % number:
        a.wrong(width, f"divisible by {heads}={number}", size)
    return max(1, size // number)


def whole_heads(a: Attributes, fields: Fields) -> None:
    """Refuses a `head_dim` other than the width over the heads."""
    expected = head_size(a, "hidden_size", "num_attention_heads")
    if fields["head_dim"] != expected:
        rule = f"hidden_size / num_attention_heads = {expected}"
        a.wrong("head_dim", rule, fields["head_dim"])


def sizes_of_whole_heads(
    a: Attributes, *, tied: bool, longest: int | None = None, **names: str
) -> Fields:
    """The sizes of older families, each of whose heads has its share of the width.

    Args:
      a: attributes of config.json.
      tied: whether the head is the embedding where nothing is said.
      longest: the context where nothing is said.
      **names: attributes of other names than Llama's, by the field.

    Returns:
      The fields, with the norms and the MLP of GPT-2.
    """
    names = {
        "context": "max_position_embeddings",
        "width": "hidden_size",
        **RESIZED,
        **names,
    }
    heads = a.size(names["heads"])
    return {
        "vocab_size": a.size("vocab_size"),
        "context": a.size(names["context"], longest),
        "layers": a.size(names["layers"], most=LAYERS),
        "width": a.size(names["width"]),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_size(a, names["width"], names["heads"]),
        "norm": "layer",
        "gated": False,
        "tie_weights": a.flag("tie_word_embeddings", tied),
    }


def alternating(
    a: Attributes, size: int | None, pattern: int
) -> tuple[int | None, ...]:
    """The windows of layers that all see this size, but for each last of `pattern`."""
    layers = a.size("num_hidden_layers", most=LAYERS)
    sliding = sliding_layers(a, [bool((i + 1) % pattern) for i in range(layers)])
    if any(sliding) and size is None:
        a.wrong("sliding_window", "given where layers slide", None)
    return tuple(size if slides else None for slides in sliding)


def switched(
    a: Attributes, default: int | None, slides: Sequence[bool]
) -> tuple[int | None, ...]:
    """The windows of layers that slide only if `use_sliding_window` says so."""
    used, size = a.flag("use_sliding_window", False), window(a, default)
    size = size if used else None
    sliding = sliding_layers(a, [size is not None and layer for layer in slides])
    if any(sliding) and size is None:
        a.wrong("use_sliding_window", "true where layer_types slide", used)
    return tuple(size if layer else None for layer in sliding)


def window_pattern(a: Attributes, default: int) -> int:
    """After how many layers one sees all, where `layer_types` does not say."""
    pattern = a.size("sliding_window_pattern", default)
    # transformers writes this name and does not read it.
    written = a.size("_sliding_window_pattern", pattern)
    if written != pattern and a.raw("layer_types") is None:
        needed = f"sliding_window_pattern={pattern}, without layer_types"
        a.wrong("_sliding_window_pattern", needed, written)
    return pattern


def window(a: Attributes, default: int | None) -> int | None:
    """How many tokens a token sees; null says all."""
    size = a.raw("sliding_window", default)
    return None if size is None else a.size("sliding_window", default)


def sliding_layers(a: Attributes, default: list[bool]) -> list[bool]:
    """Which layers see a window only, by `layer_types` if that is there."""
    types = a.raw("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or not all(
        isinstance(layer_type, str) and layer_type in _SLIDING for layer_type in types
    ):
        a.wrong("layer_types", f"a list of {' and '.join(_SLIDING)}", types)
        return default
    if len(types) != len(default):
        a.wrong("layer_types", f"{len(default)} long, one a layer", len(types))
        return default
    return [_SLIDING[layer_type] for layer_type in types]


def layer_types(shape: DecoderConfig) -> Fields:
    """The attribute that says which layers of a shape see a window only."""
    full, sliding = _SLIDING
    kinds = [full if shape.window(i) is None else sliding for i in range(shape.layers)]
    return {"layer_types": kinds}
