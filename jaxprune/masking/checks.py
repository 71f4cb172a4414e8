"""What masks must be: boolean, and of these parameters."""

from typing import Any

from jaxprune.arrays import tree
from jaxprune.typing import Masks, Params


def checked(params: Params, masks: Masks) -> list[Any]:
    """The masks' leaves in the parameters' order, or one clear error.

    Args:
      params: the parameters, or masks of them.
      masks: masks in any container.

    Returns:
      Boolean arrays, `optax.MaskedNode()` where left out.

    Raises:
      ValueError: the masks are another model's.
      TypeError: the masks are not boolean.
    """
    aligned = tree.align(params, masks, "masks")
    wrong = [
        name
        for name, mask in zip(tree.names(params), aligned, strict=True)
        if not tree.is_excluded(mask) and mask.dtype != bool
    ]
    if wrong:
        raise TypeError(
            f"masks must be boolean, True for kept, but {wrong[:6]} are not; make them "
            "with jp.masks.make(scores, sparsity), or unpack packed ones"
        )
    return aligned
