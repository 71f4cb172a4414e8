"""Tensors on levels, made from random levels and scales."""

import numpy as np

from jaxprune.lm.checkpoints import levels
from jaxprune.lm.checkpoints.levels import BFLOAT16


def rounded(shape, grid, axis, dtype, seed=0, share=0.5, largest=None, whole=False):
    """Levels, a share of them zero, and the tensor that they and scales make.

    `whole`: each group has the highest level.
    """
    rng = np.random.default_rng(seed)
    most = grid.most if largest is None else largest
    own = rng.integers(-most, most + 1, size=shape).astype(np.int8)
    own[rng.random(shape) < share] = 0
    if whole:
        np.moveaxis(own, axis, -1)[..., :: grid.group] = grid.most
    scales = np.exp(rng.normal(-3, 1, levels.scales_shape(shape, grid, axis)))
    wide = np.repeat(scales.astype(BFLOAT16).astype(np.float32), grid.group, axis)
    wide = np.take(wide, range(shape[axis]), axis)
    tensor = np.where(own == 0, np.float32(0), own * wide).astype(dtype)
    return own, tensor
