"""Torch modules as JAX functions of their parameters, and back.

`jp.torch` is a namespace that imports nothing until a name is asked for; then it needs
the extra [torch]: torch and torchax. Parameters are dictionaries of JAX arrays by their
torch names, so everything in `jp` that takes a function and parameters takes these.
"""

import importlib
from typing import Any

__all__ = ["as_arrays", "function", "hold", "load", "resize", "shrink"]

_MODULES = {
    "as_arrays": "conversion",
    "function": "module_function",
    "hold": "held_masks",
    "load": "loading",
    "resize": "resizing",
    "shrink": "shrinking",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
