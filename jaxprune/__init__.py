"""Prune neural networks in JAX: while they train, or once they are trained.

Chain `track_importance()` into an optax optimizer, turn what it saw into `scores`,
`prune`, and retrain under `keep_masks`. Or give a trained function to `prune_trained`.
"""

from jaxprune import contrib as contrib
from jaxprune import leaves as tree
from jaxprune import plot as plot
from jaxprune import scores as scores
from jaxprune import torch as torch
from jaxprune.arrays import low_bit as low_bit
from jaxprune.arrays.axes import Axes as Axes
from jaxprune.arrays.lazy import LazyArray as LazyArray
from jaxprune.graph.axis_groups import AxisGroups as AxisGroups
from jaxprune.graph.axis_groups import axis_groups as axis_groups
from jaxprune.graph.linear_ops import trace as trace
from jaxprune.masking import allocation as allocation
from jaxprune.masking import masks as masks
from jaxprune.masking import patterns as patterns
from jaxprune.masking.metrics import metrics as metrics
from jaxprune.masking.prune import prune as prune
from jaxprune.masking.sparsity import sparsity as sparsity
from jaxprune.posttraining import passes as passes
from jaxprune.posttraining.calibration import calibrate as calibrate
from jaxprune.posttraining.prune_trained import PruneResult as PruneResult
from jaxprune.posttraining.prune_trained import prune_trained as prune_trained
from jaxprune.posttraining.shrink import shrink as shrink
from jaxprune.scores.importance import get_importance as get_importance
from jaxprune.sparse.pack import PackResult as PackResult
from jaxprune.sparse.pack import pack as pack
from jaxprune.structured.shrink import ShrinkResult as ShrinkResult
from jaxprune.training import grow as grow
from jaxprune.training import schedules as schedules
from jaxprune.training import weightings as weightings
from jaxprune.training.gradual import gradual as gradual
from jaxprune.training.keep_masks import keep_masks as keep_masks
from jaxprune.training.straight_through import straight_through as straight_through
from jaxprune.training.track import track_gradients as track_gradients
from jaxprune.training.track import track_importance as track_importance
from jaxprune.typing import Importance as Importance

__version__ = "0.2.0"

__all__ = [
    "Axes",
    "AxisGroups",
    "Importance",
    "LazyArray",
    "PackResult",
    "PruneResult",
    "ShrinkResult",
    "allocation",
    "axis_groups",
    "calibrate",
    "contrib",
    "get_importance",
    "gradual",
    "grow",
    "keep_masks",
    "low_bit",
    "masks",
    "metrics",
    "pack",
    "passes",
    "patterns",
    "plot",
    "prune",
    "prune_trained",
    "schedules",
    "scores",
    "shrink",
    "sparsity",
    "straight_through",
    "torch",
    "trace",
    "track_gradients",
    "track_importance",
    "tree",
    "weightings",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
