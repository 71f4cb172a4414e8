"""Every test sees eight CPU devices and no silent broadcasting.

The variables are set before the first `import jax`; processes that tests start inherit
them. An accelerator's tests run with `JAX_PLATFORMS=cuda python -m pytest -n0 -m gpu`:
what is already chosen is left alone (of two equal XLA flags the last one counts).
"""

import importlib.util
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ["MPLBACKEND"] = "Agg"
# Most of the tests' time goes into compiling: without LLVM's passes a third less, and
# without the fusion emitters, where XLA still has the choice, again a third.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 {} {} {}".format(
    "--xla_backend_optimization_level=0" * (os.environ["JAX_PLATFORMS"] == "cpu"),
    "--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
    os.environ.get("XLA_FLAGS", ""),
)

from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# A program that another run compiled and stored is not the one under test.
jax.config.update("jax_enable_compilation_cache", False)

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
