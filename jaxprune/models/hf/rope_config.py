"""Reads the rotary scheme from a config.json, in its older and its newer form.

The newer form is an object `rope_parameters`, or one for each kind of layer. The older
form is `rope_theta` and, where a context was stretched, an object `rope_scaling`; where
both are given, `rope_scaling` counts. A scheme that is not known is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxprune.models.decoder import rope
from jaxprune.models.hf.config_reader import Attributes

_KINDS = {kind: kind for kind in ("default", "linear", "llama3", "longrope")}
_KINDS["su"] = "longrope"  # its older name
_NESTED = ("full_attention", "sliding_attention")


def one(a: Attributes, fields: Mapping[str, Any]) -> rope.Rope:
    """The scheme of all layers; what is wrong is noted in `a.problems`."""
    new, old = a.within("rope_parameters"), a.within("rope_scaling")
    theta = a.number("rope_theta", 1e4)
    share = a.number("partial_rotary_factor", 1.0)
    original = a.optional("original_max_position_embeddings")
    scheme = old if old.given() else new
    found = _scheme(scheme, fields, theta=theta, share=share, original=original)
    a.problems += scheme.problems
    return found


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
        _scheme(scheme, fields, theta=theta, share=1.0, original=None)
        for scheme, theta in zip(schemes, bases, strict=True)
    ]
    for part in (both, *schemes):
        a.problems += part.problems
    return found[0], found[1]


def _scheme(
    s: Attributes,
    fields: Mapping[str, Any],
    *,
    theta: float,
    share: float,
    original: float | None,
) -> rope.Rope:
    theta = s.number("rope_theta", theta)
    dim = int(fields["head_dim"] * s.number("partial_rotary_factor", share))
    if dim % 2 or not 0 < dim <= fields["head_dim"]:
        turned = f"an even number of {fields['head_dim']} features turning"
        s.wrong("partial_rotary_factor", turned, dim)
        dim = 2
    older = s.raw("type") is not None and s.raw("rope_type") is None
    kind = s.choice("type" if older else "rope_type", _KINDS, "default")
    found = rope.linear(theta, dim)
    if kind == "linear":
        found = rope.linear(theta, dim, s.number("factor", 1.0))
    elif kind == "llama3":
        context = s.number("original_max_position_embeddings", fields["context"])
        factor = _required(s, "factor")
        turns = {n: _required(s, f"{n}_freq_factor") for n in ("low", "high")}
        own = int(original or context)
        if turns["low"] < turns["high"]:
            found = rope.llama3(theta, dim, factor=factor, original=own, **turns)
        elif not s.problems:
            over = f"over low_freq_factor={turns['low']}"
            s.wrong("high_freq_factor", over, turns["high"])
    elif kind == "longrope":
        found = _longrope(s, fields, theta, dim, original)
    s.rest()
    return found


def _required(s: Attributes, name: str) -> float:
    value = s.optional(name)
    if value is None and s.raw(name) is None:
        s.wrong(name, "a positive number", None)
    return 1.0 if value is None else value


def _longrope(
    s: Attributes,
    fields: Mapping[str, Any],
    theta: float,
    dim: int,
    original: float | None,
) -> rope.Rope:
    own = s.number("original_max_position_embeddings", 4096)
    original = own if original is None else original
    factor = s.number("factor", fields["context"] / original)
    scale = 1.0
    if factor > 1:
        scale = math.sqrt(1 + math.log(factor) / math.log(original))
    scale = s.number("attention_factor", scale)
    lists = {name: s.numbers(f"{name}_factor") for name in ("short", "long")}
    for name, factors in lists.items():
        if len(factors) != dim // 2 and not s.problems:
            s.wrong(f"{name}_factor", f"{dim // 2} numbers long", len(factors))
    if s.problems:
        return rope.linear(theta, dim)
    return rope.longrope(theta, dim, **lists, original=int(original), scale=scale)
