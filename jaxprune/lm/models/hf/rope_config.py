"""Reads the rotary scheme from a config.json, in its older and its newer form.

The newer form is an object `rope_parameters`, or one for each kind of layer. The older
form is `rope_theta` and, where a context was stretched, an object `rope_scaling`; where
both are given, `rope_scaling` counts. A scheme that is not known is refused by name.
Phi's and GPT-NeoX's heads may turn in part: transformers' other classes do not look at
`partial_rotary_factor`, so it is refused there.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.hf.config_reader import Attributes

_KINDS = {
    kind: kind
    for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
}
_KINDS["su"] = "longrope"  # its older name
# transformers reads two older names of Phi-3's long rope, and refuses all else there.
_KINDS_OF_PHI3 = {"default": "default"} | dict.fromkeys(
    ("longrope", "su", "yarn"), "longrope"
)
_NESTED = ("full_attention", "sliding_attention")
# More features of a head than this would be a mistake.
_MOST_FEATURES = 2**16


class _Given(NamedTuple):
    """What the rest of a config.json says of a scheme.

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
      a: the attributes.
      fields: the context and the features of a head.
      theta: the base where none is given.
      share: of a head's features that turn where none is given; None where all must.
      names: the attributes outside of the scheme that say the two.

    Returns:
      The scheme.
    """
    given = _Given(
        fields["context"],
        fields["head_dim"],
        a.number(names[0], theta),
        None if share is None else a.number(names[1], share),
        a.optional("original_max_position_embeddings"),
    )
    return _older_or_newer(a, given, _KINDS)


def of_phi3(a: Attributes, fields: Mapping[str, Any]) -> rope.Rope:
    """The scheme of Phi-3, a share of whose features may turn."""
    # transformers gives the class 4096 where config.json says nothing, and lets that
    # go before the scheme's own.
    original = a.number("original_max_position_embeddings", 4096)
    given = _Given(
        fields["context"],
        fields["head_dim"],
        a.number("rope_theta", 1e4),
        a.number("partial_rotary_factor", 1.0),
        original,
    )
    return _older_or_newer(a, given, _KINDS_OF_PHI3)


def full_and_sliding(
    a: Attributes, fields: Mapping[str, Any]
) -> tuple[rope.Rope, rope.Rope]:
    """The schemes of layers that see all, and of those that see a window."""
    both, old = a.within("rope_parameters"), a.within("rope_scaling")
    bases = (a.number("rope_theta", 1e6), a.number("rope_local_base_freq", 1e4))
    schemes = [both.within(name) for name in _NESTED]
    both.rest()
    schemes[0] = old if old.given() else schemes[0]
    found = [
        _scheme(scheme, _Given(fields["context"], fields["head_dim"], theta), _KINDS)
        for scheme, theta in zip(schemes, bases, strict=True)
    ]
    for part in (both, *schemes):
        a.problems += part.problems
    return found[0], found[1]


def _older_or_newer(
    a: Attributes, given: _Given, kinds: Mapping[str, str]
) -> rope.Rope:
    new, old = a.within("rope_parameters"), a.within("rope_scaling")
    scheme = old if old.given() else new
    found = _scheme(scheme, given, kinds)
    a.problems += scheme.problems
    return found


def _scheme(s: Attributes, given: _Given, kinds: Mapping[str, str]) -> rope.Rope:
    theta = s.number("rope_theta", given.theta)
    dim = _turning(s, given)
    older = s.raw("type") is not None and s.raw("rope_type") is None
    kind = s.choice("type" if older else "rope_type", kinds, "default")
    found = rope.linear(theta, dim)
    if kind == "linear":
        found = rope.linear(theta, dim, s.number("factor", 1.0))
    elif kind == "dynamic":
        # The base grows with a sequence past the context, and none is longer here.
        s.number("factor", 1.0)
        if s.number("original_max_position_embeddings", given.context) != given.context:
            own = f"max_position_embeddings={given.context}"
            name = "original_max_position_embeddings"
            s.wrong(name, own, s.raw(name))
    elif kind == "llama3":
        found = _llama3(s, given, theta, dim)
    elif kind == "yarn":
        found = _yarn(s, given, theta, dim)
    elif kind == "longrope":
        found = _longrope(s, given, theta, dim)
    s.rest()
    return found


def _turning(s: Attributes, given: _Given) -> int:
    """How many features of a head turn."""
    share = s.number("partial_rotary_factor", given.share or 1.0)
    if given.share is None and share != 1:
        s.wrong("partial_rotary_factor", "1, since all of a head turns here", share)
        share = 1.0
    dim = int(given.head_dim * share) if share <= 1 else 0
    if dim % 2 or not 0 < dim <= min(given.head_dim, _MOST_FEATURES):
        turned = f"an even number of {given.head_dim} features turning"
        s.wrong("partial_rotary_factor", turned, dim)
        return 2
    return dim


def _original(s: Attributes, given: _Given) -> float:
    own = s.number("original_max_position_embeddings", given.context)
    return own if given.original is None else given.original


def _llama3(s: Attributes, given: _Given, theta: float, dim: int) -> rope.Rope:
    original, factor = _original(s, given), _required(s, "factor")
    turns = {name: _required(s, f"{name}_freq_factor") for name in ("low", "high")}
    if turns["low"] < turns["high"]:
        return rope.llama3(theta, dim, factor=factor, original=int(original), **turns)
    if not s.problems:
        over = f"over low_freq_factor={turns['low']}"
        s.wrong("high_freq_factor", over, turns["high"])
    return rope.linear(theta, dim)


def _yarn(s: Attributes, given: _Given, theta: float, dim: int) -> rope.Rope:
    original = _original(s, given)
    factor = s.number("factor", given.context / original)
    turns = {"fast": s.number("beta_fast", 32.0), "slow": s.number("beta_slow", 1.0)}
    scales = [s.optional(name) for name in ("mscale", "mscale_all_dim")]
    one, other = (1.0, None) if None in scales else scales
    scale = rope.yarn_scale(factor, one or 1.0)
    if other is not None:
        scale /= rope.yarn_scale(factor, other)
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
        scale=scale,
        truncate=truncate,
        **turns,
    )


def _required(s: Attributes, name: str) -> float:
    value = s.optional(name)
    if value is None and s.raw(name) is None:
        s.wrong(name, "a positive number", None)
    return 1.0 if value is None else value


def _longrope(s: Attributes, given: _Given, theta: float, dim: int) -> rope.Rope:
    original = _original(s, given)
    factor = s.number("factor", given.context / original)
    scale = 1.0
    if factor > 1 and original > 1:
        scale = math.sqrt(1 + math.log(factor) / math.log(original))
    elif factor > 1:
        name = "original_max_position_embeddings"
        s.wrong(name, "over 1 where a context is stretched", original)
    scale = s.number("attention_factor", scale)
    lists = {name: s.numbers(f"{name}_factor") for name in ("short", "long")}
    for name, factors in lists.items():
        if len(factors) != dim // 2 and not s.problems:
            s.wrong(f"{name}_factor", f"{dim // 2} numbers long", len(factors))
    if s.problems:
        return rope.linear(theta, dim)
    return rope.longrope(theta, dim, **lists, original=int(original), scale=scale)
