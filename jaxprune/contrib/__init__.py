"""What is not settled: each file is one idea whose names and defaults may change."""

from jaxprune.contrib.lora import lora as lora
from jaxprune.contrib.scale_by_density import scale_by_density as scale_by_density

__all__ = ["lora", "scale_by_density"]


def __dir__() -> list[str]:
    return __all__
