"""The library needs its base dependencies and no more.

Here the other packages are installed, but whoever imports them is refused; `.ci/run`
runs the same program where they are not installed, with the wheel that it has built.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import bare_library

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.full
def test_training_pruning_and_shrinking_import_no_extra():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, bare_library.__file__, "refuse"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "jaxprune") in done.stdout


def test_no_base_dependency_is_what_an_extra_brings():
    names = {re.match(r"[\w.-]+", need)[0] for need in PROJECT["dependencies"]}
    assert names.isdisjoint(bare_library.EXTRAS)


@pytest.mark.parametrize("name", ["flax", "flax.nnx", "orbax.checkpoint"])
def test_an_import_of_an_extra_is_refused(name):
    with pytest.raises(ModuleNotFoundError, match="not a base dependency"):
        bare_library.Refuse().find_spec(name)
