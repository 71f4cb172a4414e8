"""Builds the kernels with the headers of the jaxlib that they will run with.

pip builds in an environment of its own, whose interpreter still knows where the
packages of the Python lie that it installs for. If no jaxlib is there, the newest one
is asked for; `JAXPRUNE_KERNELS_INCLUDE` names another folder of headers.
"""

import importlib.util
import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCES = ("plain", "avx2", "avx512", "neon", "select", "handlers")


def include_dir():
    """The folder of jaxlib's headers, or None."""
    places = [os.environ.get("JAXPRUNE_KERNELS_INCLUDE")]
    if spec := importlib.util.find_spec("jaxlib"):
        places.append(Path(spec.origin).parent / "include")
    # Of the Python that pip installs for.
    places += [
        Path(sysconfig.get_path(name)) / "jaxlib" / "include"
        for name in ("purelib", "platlib")
    ]
    header = Path("xla") / "ffi" / "api" / "ffi.h"
    return next((str(p) for p in places if p and (Path(p) / header).exists()), None)


include = include_dir()
# As system headers, so that their warnings are not shown.
flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off"]
flags += ["-isystem", include] if include else []
setup(
    ext_modules=[
        Extension(
            "jaxprune_kernels._kernels",
            [f"src/{name}.cpp" for name in SOURCES],
            depends=["src/matrix.h", "src/rows.inc", "src/targets.h"],
            language="c++",
            extra_compile_args=flags,
        )
    ],
    setup_requires=[] if include else ["jaxlib>=0.10.2"],
)
