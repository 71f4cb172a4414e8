"""Passes after training, that chain: `jp.prune_trained(fn, params, batches, passes)`.

`magnitude`, `wanda`, `ria`, `sparsegpt` and `alps` choose which weights are kept.
`correct` makes up for what earlier segments lost, and `quantize` puts what is left on
the levels of int4 or int8. `chain` makes one pass of several, `effort` the best known
one for the time it takes. A pass of your own extends `Prune`.
"""

from jaxprune.posttraining.passes.base import Matrix as Matrix
from jaxprune.posttraining.passes.base import Pass as Pass
from jaxprune.posttraining.passes.base import Solution as Solution
from jaxprune.posttraining.passes.chaining import Chain as Chain
from jaxprune.posttraining.passes.chaining import chain as chain
from jaxprune.posttraining.passes.correction import Correct as correct
from jaxprune.posttraining.passes.efforts import effort as effort
from jaxprune.posttraining.passes.pruning import ALPS as alps
from jaxprune.posttraining.passes.pruning import METHODS as METHODS
from jaxprune.posttraining.passes.pruning import RIA as ria
from jaxprune.posttraining.passes.pruning import ByInputs as ByInputs
from jaxprune.posttraining.passes.pruning import Magnitude as magnitude
from jaxprune.posttraining.passes.pruning import Prune as Prune
from jaxprune.posttraining.passes.pruning import SparseGPT as sparsegpt
from jaxprune.posttraining.passes.pruning import Wanda as wanda
from jaxprune.posttraining.passes.quantization import Quantize as quantize

__all__ = [
    "METHODS",
    "ByInputs",
    "Chain",
    "Matrix",
    "Pass",
    "Prune",
    "Solution",
    "alps",
    "chain",
    "correct",
    "effort",
    "magnitude",
    "quantize",
    "ria",
    "sparsegpt",
    "wanda",
]


def __dir__() -> list[str]:
    return __all__
