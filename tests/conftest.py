"""Every test sees eight CPU devices and no silent broadcasting.

The variables are set before the first `import jax`; processes that tests start inherit
them. An accelerator's tests run with `JAX_PLATFORMS=cuda python -m pytest -n0 -m gpu`:
what is already chosen is left alone (of two equal XLA flags the last one counts).
"""

import atexit
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["KERAS_BACKEND"] = "jax"  # read once, and others import Keras too
# Most of the tests' time goes into compiling: without LLVM's passes (JAX's switch) it
# is a third less, without the fusion emitters, where XLA still has the choice, again a
# third. A module that is cut into parts for more cores takes longer in all.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    "{} {}"
).format(
    "--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
    os.environ.get("XLA_FLAGS", ""),
)
# What one module, or the other of pytest's two processes, has compiled is not compiled
# again. The folder is of this run alone, or the one that `.ci/run` names for a leg.
if "JAXPRUNE_TESTS_COMPILED" not in os.environ:
    os.environ["JAXPRUNE_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(
        shutil.rmtree, os.environ["JAXPRUNE_TESTS_COMPILED"], ignore_errors=True
    )
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAXPRUNE_TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# Other projects install a package of that name (draccus, of Levanter), which would be
# taken for this directory.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [os.path.dirname(__file__)]

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules are imported to look for doctests; this one cannot be without torch.
collect_ignore = (
    [] if importlib.util.find_spec("torch") else ["support/torch_phi3_vision.py"]
)

# No deadline: the first example of a shape compiles.
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


# What these hold are files, shapes, flows, and logits to a tolerance, so they compile
# quickly even where the default suite is run with all optimisations. A module of
# another folder imports `quick_compilation` for the same.
QUICK = {"benchmarks", "experiments", "graph", "lm"}


@functools.cache
def folders(path: Path) -> set[str]:
    """Names of the folders of the project that a test lies in."""
    return {*path.parent.resolve().relative_to(ROOT).parts}


# What these hold does not depend on the Python, so `.ci/run` runs them on one.
ONE_PYTHON = {"benchmarks", "experiments"}


@pytest.hookimpl(tryfirst=True)  # before what `-m` leaves out is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what one Python is enough for, unless its own marks ask for both.

    And the examples of `jaxprune.lm`: each compiles a decoder, which takes seconds.
    """
    for item in items:
        if isinstance(item, pytest.DoctestItem) and "lm" in folders(item.path):
            item.add_marker("full")
        both = item.get_closest_marker("parity") or item.get_closest_marker("jax_api")
        if not both and not ONE_PYTHON.isdisjoint(folders(item.path)):
            item.add_marker("one_python")


@pytest.fixture(scope="module", autouse=True)
def quick_folders(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles quickly in the folders of `QUICK`."""
    asked = jax.config.read("jax_disable_most_optimizations")
    quick = asked or not QUICK.isdisjoint(folders(request.path))
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", asked)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Frees a module's compiled programs at its end.

    Each holds several memory maps, and a process may have 65530 by default: all modules
    together have more.
    """
    yield
    jax.clear_caches()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Names a failure when it happens: a long run may never come to its summary."""
    if report.failed and os.environ.get("CI"):
        print(f"\nFAILED so far: {report.nodeid} ({report.when})", flush=True)
