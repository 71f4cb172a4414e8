"""Which leaves may be pruned, by one rule on name and leaf, and why not the others.

A rule is any function of a leaf's name and the leaf; it is asked when scores are made.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from jaxprune.arrays.messages import columns, listed
from jaxprune.arrays.tree import fits, is_excluded, is_floating
from jaxprune.arrays.tree import named_leaves as named_leaves
from jaxprune.arrays.tree import names as names

__all__ = ["excluding", "explain", "named_leaves", "names", "prunable"]


def __dir__() -> list[str]:
    return __all__


# What a name speaks of, and the words that say so: whole words, of the leaf's own name
# or of the module that holds it. "text_embedding_model/dense/kernel" is no embedding.
_HERE = r"(_[^/]*)?(/[^/]*)?$"
_UNPRUNABLE = {
    "an embedding": rf"(^|[/_])((embed|embedding)s?|wte|wpe)\d*{_HERE}"
    rf"|(^|[/_])patch_embed(ding)?s?/[^/]*/[^/]*$|(^|/)shared/weight$"
    # Of a vision transformer, one row each: (1, tokens, width).
    r"|(^|[/_])(cls|class|dist(illation)?|mask|register|query)_tokens?$",
    "a normalisation": r"(^|[/_])((layer|rms|batch|group|instance)?norms?"
    rf"|normali[sz]ation|ln[a-z]?|bn)\d*{_HERE}|(^|[/_])scale(/[^/]*)?$",
    "a bias": r"(^|[/_])bias(_table)?(/[^/]*)?$",
    # "head_0" may be one of attention's.
    "an output head": r"(^|/)(((lm|output|classification|prediction|value|policy)_head"
    r"|classifier)(_?\d+)?|head|logits(_dense)?|score|unembed)(/[^/]*)?$"
    # Under a number it is the last layer of a block.
    r"|^output/weight$|^(params/)?([^/\d]*/)?output_layer/(weight|kernel)$",
    "a router": r"(^|[/_])router(_?\d+)?(/[^/]*){0,2}$"
    r"|(^|/)(shared_expert_)?gate/(wg/)?weight$|moe/gate/[^/]*$",
    "decays of a state space": r"(^|/)a_log$",
    "a depthwise convolution": rf"(^|[/_])(dw_?conv|depthwise(_conv)?(_?[123]d)?"
    rf"|conv_?dw)\d*{_HERE}",
}
# What PEFT puts between a module and its weights.
_WRAPPED = r"/(base_layer|original_module|modules_to_save/[^/]*)/"
# Of Mamba and Qwen3-Next: (taps, 1, channels), in torch (channels, 1, taps).
_SHORT_CONVOLUTION = rf"(^|[/_])conv_?1d\d*{_HERE}"
_MOST_TAPS = 8


def prunable(name: str, leaf: Any) -> bool:
    """Whether a leaf may be pruned unless the caller says otherwise.

    A leaf may be pruned if it is floating, has two axes or more, and neither its name
    nor that of its module names an embedding, a normalisation, a bias or an output head
    (Islam et al. leave these alone too), nor the router of a mixture of experts
    or `A_log`, where zero means something else. Whole words count:
    "denormalizer/kernel" may be pruned, and so may "head/mlp/kernel". "gate/weight" is
    taken for a router's; give a rule of your own where it is a gated layer's.

    Kernels of depthwise convolutions have few weights for what they do, and are left
    dense where they are named so ("dwconv", "depthwise", "conv_dw"): no shape tells
    them from a first convolution of gray pictures, (3, 3, 1, channels). So are kernels
    of at most 8 taps named "conv1d" with one input, as state space models have them.

    Args:
      name: path name of the leaf.
      leaf: an array or anything with `shape` and `dtype`.

    Returns:
      True when the leaf may be pruned.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.tree.prunable("blocks/0/mlp/up/kernel", jnp.zeros((4, 8)))
      True
      >>> jp.tree.prunable("token_embedding/embedding", jnp.zeros((4, 8)))
      False
    """
    return why_unprunable(name, leaf) is None


def why_unprunable(name: str, leaf: Any) -> str | None:
    """Why the default rule leaves a leaf alone, as "one axis"; None if it does not."""
    if why := _why_no_matrix(leaf):
        return why
    if _is_short_convolution(name, leaf):
        return "one input and few taps"
    what = _named_as(name)
    return None if what is None else f"named as {what}"


def is_kept_by_name(name: str) -> bool:
    """Whether the default rule leaves a leaf alone for its name, whatever its shape.

    Args:
      name: path name of the leaf.

    Returns:
      True where it names an embedding, a norm, a bias, a head, a router or decays.
    """
    return _named_as(name) is not None


def _split_words(name: str) -> str:
    """A name in lower case, its words apart by underscores, its parts by slashes."""
    # "LayerNorm" has two words, and so has "LMHead".
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    # Torch's names have dots: "bert.embeddings.word_embeddings.weight".
    return name.lower().replace("-", "_").replace(".", "/")


def _is_short_convolution(name: str, leaf: Any) -> bool:
    """Whether a leaf is a depthwise kernel over time, of a few taps."""
    taps = min((size for size in leaf.shape if size > 1), default=1)
    few = leaf.ndim > 2 and 1 in leaf.shape and taps <= _MOST_TAPS
    return few and re.search(_SHORT_CONVOLUTION, _split_words(name)) is not None


def _named_as(name: str) -> str | None:
    """What a name speaks of that is left alone, as "a bias", or None."""
    name = re.sub(_WRAPPED, "/", _split_words(name))
    for what, words in _UNPRUNABLE.items():
        if re.search(words, name):
            return what
    return None


def _why_no_matrix(leaf: Any) -> str | None:
    """Why a leaf is no matrix of floating numbers, or None if it is one."""
    if not is_floating(leaf):
        return "not floating"
    if leaf.ndim < 2:
        return "no axes" if leaf.ndim == 0 else "one axis"
    return None


def excluding(*globs: str) -> "Excluding":
    """The default rule less the leaves whose names match one of these globs.

    Args:
      *globs: shell-style patterns on path names, such as "blocks/0/*".

    Returns:
      A rule for the `prunable` argument of a criterion. A glob that matches no leaf of
      the tree that it is used on is refused there, with the names that are near it.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> rule = jp.tree.excluding("blocks/0/*")
      >>> rule("blocks/0/kernel", jnp.zeros((4, 8)))
      False
    """
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"excluding takes globs on path names, got {globs}; write "
            'excluding("blocks/0/*", "head/*")'
        )
    return Excluding(globs)


@dataclasses.dataclass(frozen=True)
class Excluding:
    """The default rule less the leaves whose names match a glob, from `excluding`."""

    globs: tuple[str, ...]

    def __call__(self, name: str, leaf: Any) -> bool:
        """Whether the leaf may be pruned."""
        return self.why(name, leaf) is None

    def check(self, names: Sequence[str]) -> None:
        """Refuses globs that match none of a tree's names."""
        for glob in self.globs:
            if not any(fits(name, glob) for name in names):
                raise ValueError(
                    f"excluding({glob!r}) must match a leaf, but matches none; near it "
                    f"are {_near(glob, names)}, and jp.tree.names(params) has all"
                )

    def why(self, name: str, leaf: Any) -> str | None:
        """Why the leaf is left alone, or None if it may be pruned."""
        for glob in self.globs:
            if fits(name, glob):
                return f"excluded by {glob!r}"
        return why_unprunable(name, leaf)


@dataclasses.dataclass(frozen=True)
class Including:
    """The matrices whose names match a glob, from `prunable="blocks/*"`."""

    globs: tuple[str, ...]

    def __call__(self, name: str, leaf: Any) -> bool:
        """Whether the leaf may be pruned."""
        return self.why(name, leaf) is None

    def check(self, names: Sequence[str]) -> None:
        """Refuses globs that match none of a tree's names."""
        for glob in self.globs:
            if not any(fits(name, glob) for name in names):
                raise ValueError(
                    f"prunable={glob!r} must match a leaf, but matches none; near it "
                    f"are {_near(glob, names)}, and jp.tree.names(params) has all"
                )

    def why(self, name: str, leaf: Any) -> str | None:
        """Why the leaf is left alone, or None if it may be pruned."""
        if not any(fits(name, glob) for glob in self.globs):
            return f"not of {', '.join(map(repr, self.globs))}"
        return _why_no_matrix(leaf)


def as_rule(prunable: Any) -> Callable[[str, Any], bool]:
    """The rule that a caller gave: a function, or globs on path names.

    Args:
      prunable: function of a path name and a leaf, a glob, or several.

    Returns:
      The function.

    Raises:
      TypeError: it is none of these.

    Example:
      >>> as_rule("blocks/*")
      Including(globs=('blocks/*',))
    """
    if isinstance(prunable, str):
        return Including((prunable,))
    if isinstance(prunable, list | tuple) and all(isinstance(g, str) for g in prunable):
        return Including(tuple(prunable))
    if not callable(prunable):
        raise TypeError(
            "prunable must be a function of a leaf's name and the leaf, or globs on "
            f'names, got {prunable!r}; write prunable="blocks/*", or '
            'jp.tree.excluding("head/*")'
        )
    return cast(Callable[[str, Any], bool], prunable)


def _near(glob: str, names: Sequence[str]) -> str:
    """Names that resemble a glob; where none does, the first few."""
    return listed(difflib.get_close_matches(glob, names, 3, 0.4) or names, 3)


_NO_ARRAY = "no array"


class Row(NamedTuple):
    """What a rule says of a leaf.

    Attributes:
      name: the leaf's path name.
      shape: its shape.
      pruned: whether it may be pruned.
      why: why not, in a few words; empty where it may.
    """

    name: str
    shape: tuple[int, ...]
    pruned: bool
    why: str


class Explanation(tuple[Row, ...]):
    """The rows of `explain`, one a leaf; printed they are a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """A line a leaf, the number of weights that may be pruned last."""
        cells = [(row.name, str(row.shape), row.why or "may be pruned") for row in self]
        total = sum(math.prod(row.shape) for row in self if row.why != _NO_ARRAY)
        prunable_size = sum(math.prod(row.shape) for row in self if row.pruned)
        last = f"{prunable_size:,} of {total:,} weights may be pruned"
        return f"{columns(cells)}\n{last}" if cells else last


def explain(params: Any, *, prunable: Any = prunable) -> Explanation:
    """Which leaves would be pruned, and why not the others.

    Args:
      params: a pytree of arrays, or of `jax.ShapeDtypeStruct`.
      prunable: rule of which leaves may be pruned, as a criterion takes it.

    Returns:
      A row (name, shape, pruned, why) for each leaf; `print` it for a table.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> print(jp.tree.explain({"up": {"kernel": jnp.ones((4, 8)), "b": jnp.ones(8)}}))
      up/b       (8,)    one axis
      up/kernel  (4, 8)  may be pruned
      32 of 40 weights may be pruned
    """
    named = named_leaves(params)
    # A rule that matches nothing is refused here as it is when scores are made.
    rule = checked_rule(prunable, list(named))
    return Explanation(_row(*item, rule) for item in named.items())


def checked_rule(prunable: Any, names: Sequence[str]) -> Callable[[str, Any], bool]:
    """The rule that a caller gave, whose globs each match one of a tree's names."""
    rule = as_rule(prunable)
    if isinstance(rule, Excluding | Including):
        rule.check(names)
    return rule


def _row(name: str, leaf: Any, prunable: Callable[[str, Any], bool]) -> Row:
    pruned = not is_excluded(leaf) and bool(prunable(name, leaf))
    if not hasattr(leaf, "shape"):  # a function of an Equinox model, say
        return Row(name, (), False, _NO_ARRAY)
    # A rule may say why itself; of others the default rule's reason is the best guess.
    explain_rule = getattr(prunable, "why", why_unprunable)
    why = (
        None if pruned else explain_rule(name, leaf) or "excluded by the rule prunable="
    )
    return Row(name, tuple(leaf.shape), pruned, why or "")
