"""Figures of what was pruned: matplotlib axes, to be labelled and saved as you like."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune.masking import masks as masks_
from jaxprune.masking.packed_mask import is_packed
from jaxprune.masking.sparsity import sparsity
from jaxprune.typing import Masks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["by_layer", "masks", "overlap"]


def __dir__() -> list[str]:
    return __all__


def by_layer(params: Any, *, axes: "Axes | None" = None) -> "Axes":
    """The share of zeros of each leaf, a bar a leaf.

    Args:
      params: parameters or masks, as `jp.sparsity` takes them.
      axes: matplotlib axes to draw on; new ones if left out.

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> axes = jp.plot.by_layer({"up": jnp.eye(4), "down": jnp.ones((4, 2))})
      >>> [float(bar.get_width()) for bar in axes.patches]
      [0.0, 75.0]
    """
    axes, counts = _axes(axes), sparsity(params)
    names = list(counts.by_leaf)
    shares = [100 * zeros / max(size, 1) for zeros, size in counts.by_leaf.values()]
    axes.barh(range(len(names)), shares)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(100 * counts.total, color="grey", linewidth=1, linestyle=":")
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros (%)")
    return axes


def masks(mask: Any, *, axes: "Axes | None" = None) -> "Axes":
    """One mask as a picture: what is kept is dark.

    Args:
      mask: boolean array of two axes or more, or parameters, whose zeros are removed;
        all axes but the last become rows.
      axes: matplotlib axes to draw on; new ones if left out.

    Returns:
      The axes.

    Raises:
      ValueError: the mask has less than two axes.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> axes = jp.plot.masks(jnp.eye(4, 6, dtype=bool))
      >>> axes.images[0].get_array().shape
      (4, 6)
    """
    array = np.asarray(masks_.unpack(mask) if is_packed(mask) else mask)
    if not (np.ndim(array) >= 2 and np.size(array) > 0):
        raise ValueError(
            f"a mask to be drawn must have two axes or more, got shape {array.shape}; "
            "give one leaf, such as masks['up']['kernel']"
        )
    axes = _axes(axes)
    rows = array.reshape(-1, array.shape[-1]) != 0  # (rows, outputs)
    axes.imshow(rows, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xlabel("output")
    axes.set_ylabel("input")
    return axes


def overlap(masks: Mapping[str, Masks], *, axes: "Axes | None" = None) -> "Axes":
    """How much masks agree, a cell a pair: what both keep over what one keeps.

    Args:
      masks: masks of the same parameters by name, at least two.
      axes: matplotlib axes to draw on; new ones if left out.

    Returns:
      The axes.

    Raises:
      TypeError: there are not two masks by name.
      ModuleNotFoundError: matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> a, b = jnp.array([[True, True]]), jnp.array([[False, True]])
      >>> axes = jp.plot.overlap({"a": {"w": a}, "b": {"w": b}})
      >>> axes.images[0].get_array().tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    if not (isinstance(masks, Mapping) and len(masks) >= 2):
        raise TypeError(
            f"overlap draws two masks or more by name, got {masks!r}; write "
            'overlap({"magnitude": masks, "obd": other_masks})'
        )
    axes, trees = _axes(axes), list(masks.values())
    shares = np.array([[masks_.overlap(a, b).total for b in trees] for a in trees])
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        ink = "white" if share > 0.5 else "black"  # on dark and on light cells
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(trees)), list(masks))
    axes.set_yticks(range(len(trees)), list(masks))
    return axes


def _axes(axes: "Axes | None") -> "Axes":
    """The axes given, or new ones of a figure of their own."""
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib; install it with pip install matplotlib"
        ) from error
    # Not of pyplot: nothing has to be closed, and no window is opened.
    return Figure(layout="constrained").subplots()
