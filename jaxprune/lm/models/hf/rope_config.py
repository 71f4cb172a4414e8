"""Reads the rotary scheme from a config.json, in its older and its newer form.

The newer form is an object `rope_parameters`, or one for each kind of layer. The older
form is `rope_theta` and, where a context was stretched, an object `rope_scaling`; where
both are given, `rope_scaling` counts, but for models with a scheme for each kind of
layer, where it changes that of the layers that see all. A scheme that is not known is
refused by name.

Phi's and GPT-NeoX's heads may turn in part: transformers' other classes do not look at
`partial_rotary_factor`, so it is refused there.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.hf.config_reader import Attributes

# Features of a head past which a config.json is a mistake.
_MOST_FEATURES = 2**16
_ORIGINAL = "original_max_position_embeddings"


class _Outer(NamedTuple):
    """What config.json says of a scheme outside of the scheme's own object.

    Attributes:
      context: the longest sequence.
      head_dim: features of a head.
      theta: the base, unless the scheme has its own.
      share: of a head's features that turn, likewise; None where all must.
      original: the context of pretraining, which goes before the scheme's own.
    """

    context: int
    head_dim: int
    theta: float
    share: float | None = None
    original: float | None = None


def one(
    a: Attributes,
    fields: Mapping[str, Any],
    *,
    theta: float = 1e4,
    share: float | None = None,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> rope.Rope:
    """The scheme of all layers; what is wrong is noted in `a.problems`.

    Args:
      a: attributes of config.json.
      fields: context and features of a head, fields of the shape.
      theta: base where none is given.
      share: share of a head's features that turn where none is given; None where all
        must.
      names: attributes outside of the scheme that say the two.

    Returns:
      The scheme.
    """
    outer = _Outer(
        fields["context"],
        fields["head_dim"],
        a.number(names[0], theta),
        None if share is None else a.number(names[1], share),
        a.optional(_ORIGINAL),
    )
    return _older_or_newer(a, outer, _TYPES)


def of_phi3(a: Attributes, fields: Mapping[str, Any]) -> rope.Rope:
    """The scheme of Phi-3, a share of whose features may turn."""
    # transformers gives the class 4096 where config.json says nothing, and lets that
    # go before the scheme's own.
    original = a.number(_ORIGINAL, 4096)
    outer = _Outer(
        fields["context"],
        fields["head_dim"],
        a.number("rope_theta", 1e4),
        a.number("partial_rotary_factor", 1.0),
        original,
    )
    return _older_or_newer(a, outer, _TYPES_OF_PHI3)


def full_and_sliding(
    a: Attributes, fields: Mapping[str, Any]
) -> tuple[rope.Rope, rope.Rope]:
    """The schemes of layers that see all, and of those that see a window."""
    nested, older = a.within("rope_parameters"), a.within("rope_scaling")
    thetas = (a.number("rope_theta", 1e6), a.number("rope_local_base_freq", 1e4))
    full, sliding = (
        nested.within(name) for name in ("full_attention", "sliding_attention")
    )
    nested.rest()
    # The older form stretches these layers only. transformers puts its attributes into
    # those of the newer form, whose base and type stay where it has none.
    has_type = full.raw("rope_type") is not None or not nested.present()
    if has_type and older.raw("type") is not None and older.raw("rope_type") is None:
        older.wrong("rope_type", "given, since type is not read here", None)
    full = full.updated(older)
    ropes = [
        _rope(scheme, _Outer(fields["context"], fields["head_dim"], theta), _TYPES)
        for scheme, theta in zip((full, sliding), thetas, strict=True)
    ]
    for part in (nested, older, full, sliding):
        a.problems += part.problems
    return ropes[0], ropes[1]


def _older_or_newer(
    a: Attributes, outer: _Outer, types: Mapping[str, str]
) -> rope.Rope:
    newer, older = a.within("rope_parameters"), a.within("rope_scaling")
    scheme = older if older.present() else newer
    made = _rope(scheme, outer, types)
    a.problems += scheme.problems
    return made


def _rope(s: Attributes, outer: _Outer, types: Mapping[str, str]) -> rope.Rope:
    """The scheme that an object describes, all of whose attributes must be known."""
    theta = s.number("rope_theta", outer.theta)
    dim = _turning(s, outer)
    # The older name.
    older = s.raw("type") is not None and s.raw("rope_type") is None
    rope_type = s.choice("type" if older else "rope_type", types, "default")
    made = _SCHEMES[rope_type](s, outer, theta, dim)
    s.rest()
    return made


def _turning(s: Attributes, outer: _Outer) -> int:
    """How many features of a head turn."""
    # Of a head's features.
    share = s.number("partial_rotary_factor", outer.share or 1.0)
    if outer.share is None and share != 1:
        s.wrong("partial_rotary_factor", "1, since all of a head turns here", share)
        share = 1.0
    dim = int(outer.head_dim * share) if share <= 1 else 0
    if dim % 2 or not 0 < dim <= min(outer.head_dim, _MOST_FEATURES):
        rule = f"an even number of {outer.head_dim} features turning"
        s.wrong("partial_rotary_factor", rule, dim)
        return 2
    return dim


def _original(s: Attributes, outer: _Outer) -> float:
    """The context of pretraining."""
    original = s.number(_ORIGINAL, outer.context)
    return original if outer.original is None else outer.original


def _default(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    return rope.linear(theta, dim)


def _linear(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    return rope.linear(theta, dim, s.number("factor", 1.0))


def _dynamic(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    # The base grows with a sequence past the context, and none is longer here.
    s.number("factor", 1.0)
    if s.number(_ORIGINAL, outer.context) != outer.context:
        s.wrong(_ORIGINAL, f"max_position_embeddings={outer.context}", s.raw(_ORIGINAL))
    return rope.linear(theta, dim)


def _llama3(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    original, factor = _original(s, outer), _required(s, "factor")
    low, high = (_required(s, f"{name}_freq_factor") for name in ("low", "high"))
    if low < high:
        return rope.llama3(
            theta, dim, factor=factor, low=low, high=high, original=int(original)
        )
    if not s.problems:
        s.wrong("high_freq_factor", f"over low_freq_factor={low}", high)
    return rope.linear(theta, dim)


def _yarn(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    original = _original(s, outer)
    factor = s.number("factor", outer.context / original)
    fast, slow = s.number("beta_fast", 32.0), s.number("beta_slow", 1.0)
    # DeepSeek's two weights of log(factor), of which transformers needs both or none.
    mscale, mscale_all = s.optional("mscale"), s.optional("mscale_all_dim")
    scale = rope.yarn_scale(factor, 1.0)
    if mscale is not None and mscale_all is not None:
        scale = rope.yarn_scale(factor, mscale) / rope.yarn_scale(factor, mscale_all)
    scale = s.number("attention_factor", scale)
    truncate = s.flag("truncate", True)
    if theta <= 1:
        s.wrong("rope_theta", "over 1 where rope_type is yarn", theta)
        return rope.linear(2.0, dim)
    return rope.yarn(
        theta,
        dim,
        factor=factor,
        original=original,
        fast=fast,
        slow=slow,
        scale=scale,
        truncate=truncate,
    )


def _longrope(s: Attributes, outer: _Outer, theta: float, dim: int) -> rope.Rope:
    original = _original(s, outer)
    factor = s.number("factor", outer.context / original)
    scale = 1.0
    if factor > 1 and original > 1:
        scale = math.sqrt(1 + math.log(factor) / math.log(original))
    elif factor > 1:
        s.wrong(_ORIGINAL, "over 1 where a context is stretched", original)
    scale = s.number("attention_factor", scale)
    lists = {name: s.numbers(f"{name}_factor") for name in ("short", "long")}
    for name, factors in lists.items():
        if len(factors) != dim // 2 and not s.problems:
            s.wrong(f"{name}_factor", f"{dim // 2} numbers long", len(factors))
    if s.problems:
        return rope.linear(theta, dim)
    return rope.longrope(theta, dim, **lists, original=int(original), scale=scale)


def _required(s: Attributes, name: str) -> float:
    value = s.optional(name)
    if value is None and s.raw(name) is None:
        s.wrong(name, "a positive number", None)
    return 1.0 if value is None else value


_SCHEMES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
# What `rope_type` may say, and which scheme that is: "su" is longrope's older name.
_TYPES = {name: name for name in _SCHEMES} | {"su": "longrope"}
# transformers reads two older names of Phi-3's long rope, and refuses all else there.
_TYPES_OF_PHI3 = {"default": "default"} | dict.fromkeys(
    ("longrope", "su", "yarn"), "longrope"
)
