"""The front door: parameters and scores in, pruned parameters out.

No tree of masks is ever made: thresholds are found for all leaves, then each leaf is
cut by its own. With `donate=True` each leaf's new values take the place of its old.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxprune.arrays import lazy, low_bit, placement, tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import listed
from jaxprune.arrays.topk import thresholds
from jaxprune.masking import patterns, selection
from jaxprune.masking.checks import refuse_other
from jaxprune.masking.counts import Allocation
from jaxprune.masking.patterns import Unstructured
from jaxprune.masking.selection import Selection
from jaxprune.typing import Params, Pattern, Scores


def prune(
    params: Params,
    scores: Scores,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    allocation: Allocation = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    donate: bool = False,
) -> Params:
    """Sets the weights with the lowest scores to zero; pure, and fit for `jax.jit`.

    With `donate=True` it is not pure: the old parameters are deleted. Their buffers
    hold the result, leaf by leaf, so pruning needs at most one leaf of memory more;
    reading an old leaf raises `RuntimeError`. Nothing is donated before all checks have
    passed. Under `jit`, `donate` has no effect; there give `jax.jit` itself
    `donate_argnums`.

    Args:
      params: the parameters, a pytree of arrays.
      scores: scores of these parameters; higher is kept.
      sparsity: the share to remove, in [0, 1), or {glob on the path name: share}. None
        where the pattern fixes it. Static under `jit`.
      allocation: rule that shares it out: "global" ranks all leaves together, "layer"
        removes the share from each leaf, "matrix" from each matrix of a stacked leaf,
        "erk", or a value of `jp.allocation`; also {glob: share} in the place of a
        sparsity. Shares by leaf, and a pattern that fixes them, leave nothing to share
        out.
      pattern: which weights are pruned together: a value of `jp.patterns`, or its name
        such as "2:4".
      axes: which axes are input and output; Flax's [..., in, out] by default.
      donate: whether the result may take the parameters' memory.

    Returns:
      Parameters of the same structure, dtypes and sharding. Leaves without scores
      (`optax.MaskedNode()`) come back as the same objects.

    Raises:
      ValueError: scores are another model's or NaN, or sparsity, allocation, pattern or
        a rule does not fit; a leaf to donate is used twice or deleted.
      TypeError: scores are not floating.

    Warns:
      UserWarning: nothing is left of a leaf; by one ranking not under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[4.0, -1.0], [2.0, -3.0]])}
      >>> jp.prune(params, jp.scores.magnitude(params), 0.5)["w"].tolist()
      [[4.0, 0.0], [0.0, -3.0]]
    """
    refuse_other(scores)
    tree.align(params, scores, "scores")
    named = tree.named_leaves(params)
    ranked = [
        k for k, v in tree.named_leaves(scores).items() if not tree.is_excluded(v)
    ]
    if wrong := [name for name in ranked if tree.is_excluded(named[name])]:
        raise ValueError(
            "scores must be of leaves that the parameters have, but the parameters "
            f"leave out {listed(wrong)}; call jp.prune(params, scores, sparsity)"
        )
    if donate:
        _check_owned(named, ranked, jax.tree.leaves(scores))
    pattern = patterns.parse(pattern)
    selections = selection.select(
        scores, sparsity, rule=allocation, pattern=pattern, axes=axes
    )
    for name, selected in zip(ranked, selections, strict=True):
        named[name] = _pruned(named[name], selected, pattern, donate=donate)
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    return jax.tree.unflatten(structure, list(named.values()))


def _check_owned(
    named: Mapping[str, Any], ranked: Sequence[str], scores: Sequence[Any]
) -> None:
    """Refuses to donate what would be missed elsewhere, or is gone."""
    arrays = {
        name: named[name] for name in ranked if placement.is_concrete(named[name])
    }
    uses = collections.Counter(map(_buffer, [*named.values(), *scores]))
    if wrong := [name for name, leaf in arrays.items() if leaf.is_deleted()]:
        raise ValueError(
            f"donate=True needs parameters that are there, but {listed(wrong)} are "
            "deleted; use what the call that donated them returned"
        )
    if wrong := [
        name for name, leaf in arrays.items() if leaf.size and uses[_buffer(leaf)] > 1
    ]:
        raise ValueError(
            f"donate=True needs arrays that nothing else uses, but {listed(wrong)} are "
            "other leaves or scores as well; copy those with jnp.copy, or leave "
            "donate out"
        )


def _buffer(leaf: Any) -> int | None:
    """Where a leaf lies on its first device; device_put may share a buffer."""
    if not placement.is_concrete(leaf) or leaf.is_deleted():
        return None
    return leaf.addressable_data(0).unsafe_buffer_pointer()


def _pruned(leaf: Any, selected: Selection, pattern: Pattern, *, donate: bool) -> Any:
    leaf, units, axes = lazy.array(leaf), selected.units, selected.axes
    cut: thresholds.Cut | None = selected.cut
    if not placement.is_concrete(leaf):
        return _program(None, donate=False)(leaf, units, cut, pattern, axes)
    devices = leaf.sharding.device_set
    away = placement.is_concrete(units)
    if away and placement.devices(units) != placement.devices(leaf):
        # Scores that were made elsewhere stay there; their mask travels.
        mask = selection.selected_mask(selected, pattern, leaf.shape)
        units, cut, pattern = placement.beside(mask, leaf), None, Unstructured()
    # On a mesh the result must lie where the leaf did; one device has one place.
    program = _program(leaf.sharding if len(devices) > 1 else None, donate=donate)
    return program(leaf, units, cut, pattern, axes)


@functools.cache
def _program(sharding: Any, *, donate: bool) -> Any:
    """Where the mask is True, by one compiled program for each shape."""
    return jax.jit(
        _where,
        static_argnums=(3, 4),
        donate_argnums=0 if donate else (),
        out_shardings=sharding,
    )


def _where(
    leaf: jax.Array,
    units: jax.Array,
    cut: thresholds.Cut | None,
    pattern: Pattern,
    axes: Axes,
) -> jax.Array:
    # Without a cut the units are a mask that was made where the scores are.
    kept = units if cut is None else thresholds.above_cut(units, cut)
    mask = pattern.expand(kept, leaf.shape, axes)
    return placement.masked(leaf, placement.placed(mask, low_bit.on_device(leaf)))
