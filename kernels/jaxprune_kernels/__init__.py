"""CPU kernels for packed matrices, which `jaxprune.sparse` finds by this name.

Chosen when they are loaded, by what the processor has: AVX-512 with VBMI2, AVX2, NEON,
or plain C++.
"""

import ctypes
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

__version__ = "0.2.0"

TARGETS = ("jaxprune_packed_multiply", "jaxprune_packed_expand")
"""The handlers, by the names under which they are registered."""


class Loaded(NamedTuple):
    """The kernels, or why they do not run here.

    Attributes:
      targets: name to capsule, for `jax.ffi.register_ffi_target`.
      instructions: "avx512", "avx2", "neon" or "plain".
      reason: one sentence where they do not run; "" where they do.
    """

    targets: Mapping[str, Any]
    instructions: str
    reason: str


@functools.cache
def load() -> Loaded:
    """Loads the kernels once.

    Returns:
      The handlers, or the reason why there are none.
    """
    try:
        library = _library()
    except OSError as error:
        return Loaded({}, "", f"jaxprune-kernels cannot be loaded: {error}")
    built = library.jaxprune_api_major(), library.jaxprune_api_minor()
    running = interface_version(Path(jax.ffi.include_dir()))
    if built != running:
        return Loaded(
            {},
            "",
            "jaxprune-kernels was built for version {}.{} of XLA's interface, and this "
            "jaxlib has {}.{}; install it again".format(*built, *running),
        )
    targets = {name: jax.ffi.pycapsule(getattr(library, name)) for name in TARGETS}
    return Loaded(targets, library.jaxprune_instructions().decode(), "")


def choose(instructions: str) -> bool:
    """Takes other kernels than the best ones, as tests and benchmarks do.

    Args:
      instructions: "avx512", "avx2", "neon" or "plain".

    Returns:
      Whether this processor has them; where not, nothing changes.
    """
    return bool(_library().jaxprune_choose(instructions.encode()))


def interface_version(include: Path) -> tuple[int, int]:
    """The version of XLA's interface for foreign functions that headers declare.

    Args:
      include: folder of jaxlib's headers.

    Returns:
      Major and minor; zeros where the headers do not say.
    """
    header = include / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text() if header.exists() else ""
    parts = (
        re.search(rf"define XLA_FFI_API_{part} (\d+)", text)
        for part in ("MAJOR", "MINOR")
    )
    major, minor = (int(match[1]) if match else 0 for match in parts)
    return major, minor


@functools.cache
def _library() -> ctypes.CDLL:
    # Its name ends as this Python's own extensions do.
    paths = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not paths:
        raise OSError("the compiled library is missing")
    library = ctypes.CDLL(str(paths[0]))
    library.jaxprune_instructions.restype = ctypes.c_char_p
    library.jaxprune_choose.argtypes = [ctypes.c_char_p]
    return library
