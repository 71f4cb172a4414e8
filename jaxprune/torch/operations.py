"""Operations of torch in JAX that torchax lacks, or that it gets wrong.

Of bags of embeddings it reads the offsets, so that it cannot be traced, and it knows
neither weights of samples nor a padding index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def _grouped_product(
    rows: jax.Array,
    weights: jax.Array,
    ends: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Rows times the weights of their expert: (rows, in), (experts, in, out).

    Only what mixtures of experts call: rows that lie expert by expert, each expert's up
    to its entry of `ends`.
    """
    if ends is None or rows.ndim != 2 or weights.ndim != 3 or bias is not None:
        raise NotImplementedError(
            "a grouped product is understood of rows (rows, in), weights (experts, in, "
            f"out) and the ends of groups, got {rows.shape} and {weights.shape}"
        )
    counts = jnp.diff(ends, prepend=0).astype(jnp.int32)  # (experts,)
    return jax.lax.ragged_dot(rows, weights, counts)  # (rows, out)


def _embedding_bag(
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums (mode 0), means (1) or maxima (2) of the rows of each bag.

    Bag i has the indices from offsets[i] up to the next offset. What torch returns
    beside the result is for its own gradient, and nobody reads it here.
    """
    count = offsets.shape[0] - include_last_offset
    # Of equal offsets all but the last begin an empty bag.
    positions = jnp.arange(indices.shape[0])
    bags = jnp.searchsorted(offsets, positions, side="right") - 1  # (indices,)
    # Torch adds up in float32 whatever the dtype.
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    rows = weight[indices].astype(wide)  # (indices, width)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    counts_in = (indices != padding_idx) & (bags < count)  # (indices,)
    sizes = jax.ops.segment_sum(counts_in.astype(jnp.int32), bags, count)  # (bags,)
    if mode == 2:
        lowest = jnp.where(counts_in[:, None], rows, -jnp.inf)
        highest = jax.ops.segment_max(lowest, bags, count)  # (bags, width)
        result = jnp.where(sizes[:, None] > 0, highest, 0)
    else:
        result = jax.ops.segment_sum(
            jnp.where(counts_in[:, None], rows, 0), bags, count
        )
        if mode == 1:
            result = result / jnp.maximum(sizes, 1)[:, None].astype(result.dtype)
    return result.astype(weight.dtype), bags, sizes, jnp.zeros_like(bags)


def _convolution(
    original: Callable[..., jax.Array],
    rows: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    """Of a transposed one torchax takes the groups' inputs for their outputs."""
    if transposed and groups > 1:
        inputs, outputs, *window = weight.shape  # (in, out / groups, ...)
        by_group = weight.reshape(groups, inputs // groups, outputs, *window)
        weight = jnp.swapaxes(by_group, 0, 1).reshape(weight.shape)
    return original(
        *(rows, weight, bias, stride, padding, dilation),
        *(transposed, output_padding, groups),
    )


def _average_pool(
    original: Callable[..., jax.Array],
    inputs: jax.Array,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Where a last window overhangs, torchax divides by a number of its own."""
    if not ceil_mode or not count_include_pad or divisor_override is not None:
        options = padding, ceil_mode, count_include_pad, divisor_override
        return original(inputs, window, stride, *options)
    axes = len(window)
    stride = [*stride] or [*window]
    pads = [padding] if isinstance(padding, int) else [*padding]
    pads = pads * axes if len(pads) == 1 else pads
    # Padding counts, and what lies behind it does not.
    around = [(0, 0)] * (inputs.ndim - axes) + [(pad, pad) for pad in pads]
    means = original(jnp.pad(inputs, around), window, stride, 0, True, False, None)
    # A window that begins in the padding behind the inputs is none.
    counts = (
        min(count, -(-(size + pad) // step))
        for count, size, pad, step in zip(
            *(means.shape[-axes:], inputs.shape[-axes:], pads, stride), strict=True
        )
    )
    return means[(..., *map(slice, counts))]


REPAIRS: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "avg_pool1d": _average_pool,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
}
"""What takes torchax's own operation first, by names in `torch.ops.aten`."""
OPERATIONS: dict[str, Callable[..., Any]] = {
    "_grouped_mm": _grouped_product,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
}
"""By names in `torch.ops.aten`; a torch may not have all of them."""
