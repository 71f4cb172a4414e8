"""What a logger shows of a training with masks: numbers by name, in a step or not."""

from typing import Any

from jaxprune.masking import find_masks
from jaxprune.masking.sparsity import Overlap, overlap, sparsity
from jaxprune.typing import Params


def metrics(
    state: Any, previous: Any = None, params: Params | None = None
) -> dict[str, Any]:
    """The sparsity of an optimizer's masks, and how much they changed, by leaf.

    Sparsity is the share of zeros among the weights that have a mask. Churn is the
    share of weights that only one of two masks keeps, among those that at least one
    keeps: 0 where the masks are the same, 1 where they share nothing.

    Args:
      state: optimizer state in which `masks.get` finds masks.
      previous: earlier state of the same optimizer, as before the step; None leaves
        churn out.
      params: the parameters, only needed where `masks.get` needs them.

    Returns:
      "sparsity" and "sparsity/NAME" for each leaf NAME with a mask, and with `previous`
      "churn" and "churn/NAME", all in [0, 1]: Python floats, or float32 scalars under
      `jit`, where nothing is fetched.

    Raises:
      ValueError: a state holds no masks, or those of another model.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.keep_masks(optax.adamw(0.1), {"w": jnp.array([True, False])})
      >>> state = tx.init({"w": jnp.ones(2)})
      >>> jp.metrics(state)
      {'sparsity': 0.5, 'sparsity/w': 0.5}
      >>> later = jp.masks.replace(state, {"w": jnp.array([False, True])})
      >>> jp.metrics(later, state)["churn"]
      1.0
    """
    masks = find_masks.get(state, params)
    zeros = sparsity(masks)
    rows = {"sparsity": zeros.total} | {
        f"sparsity/{name}": count / size if size else 0.0
        for name, (count, size) in zeros.by_leaf.items()
    }
    if previous is None:
        return rows
    kept = overlap(find_masks.get(previous, params), masks)
    changes = {"churn": 1 - kept.total} | {
        f"churn/{name}": 1 - Overlap(both, either, {}).total
        for name, (both, either) in kept.by_leaf.items()
    }
    return rows | changes
