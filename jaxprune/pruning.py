"""The front door: parameters and scores in, pruned parameters out."""

from collections.abc import Mapping

from jaxprune import masks, patterns, tree
from jaxprune.axes import Axes
from jaxprune.base import Params, Pattern, Scope, Scores


def prune(
    params: Params,
    scores: Scores,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    scope: Scope = "layer",
    pattern: Pattern = patterns.Unstructured(),
    axes: Axes | Mapping[str, Axes] | None = None,
) -> Params:
    """Sets the weights with the lowest scores to zero; pure, and fit for `jax.jit`.

    Args:
      params: the parameters, a pytree of arrays.
      scores: scores of these parameters; higher is kept.
      sparsity: the share to remove, in [0, 1), or {glob on the path name: share}. None
        where the pattern fixes it. Static under `jit`.
      scope: "layer" removes the share from each leaf, "global" ranks all together.
      pattern: which weights live and die together.
      axes: which axes are input and output; Flax's [..., in, out] by default.

    Returns:
      Parameters of the same structure, dtypes and sharding. Leaves without scores
      (`optax.MaskedNode()`) come back as the same objects.

    Raises:
      ValueError: scores are another model's or NaN, or sparsity, scope, pattern or a
        rule does not fit.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[4.0, -1.0], [2.0, -3.0]])}
      >>> jp.prune(params, jp.scores.magnitude(None, params), 0.5)["w"].tolist()
      [[4.0, 0.0], [0.0, -3.0]]
    """
    tree.align(params, scores, "scores")
    kept = masks.make(scores, sparsity, scope=scope, pattern=pattern, axes=axes)
    return masks.apply(params, kept)
