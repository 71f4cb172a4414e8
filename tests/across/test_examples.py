"""The programs in examples/ run as they stand, and each fits on a page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 60


def name(path):
    return path.stem


@pytest.mark.full
@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_an_example_runs_as_it_stands(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # The tests' flags compile in less time; what an example sets itself is left to it.
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    if "XLA_FLAGS" in path.read_text():
        del environment["XLA_FLAGS"]
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_an_example_is_a_page_and_listed(path):
    assert path.read_text().count("\n") < MOST_LINES
    assert f"({path.name})" in (ROOT / "examples" / "README.md").read_text()
