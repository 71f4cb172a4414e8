"""A number for each weight: how much it matters. The higher is kept.

Every name here is a criterion, a function of (params, importance).
"""

from jaxprune.scores.from_training import averaged_magnitude as averaged_magnitude
from jaxprune.scores.from_training import averaged_weight as averaged_weight
from jaxprune.scores.from_training import magnitude as magnitude
from jaxprune.scores.from_training import obd as obd
from jaxprune.scores.from_training import (
    preconditioned_magnitude as preconditioned_magnitude,
)
from jaxprune.scores.from_training import random as random
from jaxprune.scores.from_training import taylor as taylor
from jaxprune.scores.from_training import threshold as threshold

__all__ = [
    "averaged_magnitude",
    "averaged_weight",
    "magnitude",
    "obd",
    "preconditioned_magnitude",
    "random",
    "taylor",
    "threshold",
]


def __dir__() -> list[str]:
    return __all__
