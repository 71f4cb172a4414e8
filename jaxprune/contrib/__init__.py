"""What is not settled: each file is one idea whose names and defaults may change."""

from jaxprune.contrib.admm import admm as admm
from jaxprune.contrib.calibrate_gradients import (
    calibrate_gradients as calibrate_gradients,
)
from jaxprune.contrib.lora import lora as lora
from jaxprune.contrib.scale_by_density import scale_by_density as scale_by_density
from jaxprune.contrib.state_shardings import state_shardings as state_shardings

__all__ = [
    "admm",
    "calibrate_gradients",
    "lora",
    "scale_by_density",
    "state_shardings",
]


def __dir__() -> list[str]:
    return __all__
