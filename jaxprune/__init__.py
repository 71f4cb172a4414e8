"""Which weights of a network matter, and how to get rid of the rest, in JAX.

Chain `track_importance()` into an optax optimizer, turn what it saw into `scores`,
`prune`, and retrain under `keep_masks`.
"""

from jaxprune import averages as averages
from jaxprune import masks as masks
from jaxprune import methods as methods
from jaxprune import patterns as patterns
from jaxprune import scores as scores
from jaxprune import sharding as sharding
from jaxprune import shares as shares
from jaxprune import storage as storage
from jaxprune import tree as tree
from jaxprune.axes import Axes as Axes
from jaxprune.base import Importance as Importance
from jaxprune.calibration import calibrate as calibrate
from jaxprune.importance import get_importance as get_importance
from jaxprune.importance import track_gradients as track_gradients
from jaxprune.importance import track_importance as track_importance
from jaxprune.keep import keep_masks as keep_masks
from jaxprune.low_rank import lora as lora
from jaxprune.pruning import prune as prune
from jaxprune.stored import Stored as Stored
from jaxprune.tracing import trace as trace
from jaxprune.trained import prune_trained as prune_trained
from jaxprune.tree import sparsity as sparsity

__version__ = "0.1.0"
