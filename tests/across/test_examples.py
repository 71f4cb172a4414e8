"""The programs in examples/ run as they stand, and each fits on a page.

They print what the tutorial that shows them says.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.printed import assert_prints

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 60


def name(path):
    return path.stem


TORCH = [path for path in EXAMPLES if "jp.torch" in path.read_text()]
# Named after the package whose trainer they run in.
IN_TRAINERS = [path for path in EXAMPLES if path.stem.startswith("train_in_")]
ALONE = [path for path in EXAMPLES if "XLA_FLAGS" in path.read_text()]
RUN = """
import contextlib, io, pathlib, runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(path, run_name="__main__")
    assert output.getvalue().strip(), path
    pathlib.Path(pathlib.Path(path).stem).write_text(output.getvalue())
"""
PRINTED = {
    match[1]: match[2]
    for page in [
        *(ROOT / "docs" / "tutorials").glob("*.md"),
        ROOT / "docs" / "trainers.md",
    ]
    for match in re.finditer(
        r"^--8<-- \"examples/(\w+)\.py\"$.*?^```text\n(.*?)^```$",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
}


@pytest.mark.full
@pytest.mark.parametrize(
    "paths",
    [
        [path for path in EXAMPLES if path not in (*ALONE, *TORCH, *IN_TRAINERS)],
        *([path] for path in ALONE),
    ],
    ids=lambda paths: " ".join(map(name, paths)),
)
def test_examples_run_as_they_stand(paths, tmp_path):
    """One after the other in a process; what sets flags of XLA has one to itself."""
    run_examples(paths, tmp_path)


@pytest.mark.full
@pytest.mark.parity
@pytest.mark.parametrize("path", TORCH, ids=name)
def test_examples_with_torch_run_as_they_stand(path, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("torchax")
    run_examples([path], tmp_path)


@pytest.mark.full
@pytest.mark.clients
@pytest.mark.parametrize("path", IN_TRAINERS, ids=name)
def test_other_trainers_hold_zeros_on_eight_devices(path, tmp_path):
    """A process each, as they change JAX's settings; they print more than the page."""
    if not find_spec(path.stem.removeprefix("train_in_")):
        pytest.skip(f"needs {path.stem.removeprefix('train_in_')}")
    done = subprocess.run(
        [sys.executable, path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    results = re.findall(r"^\d+ [\d. ]+$", done.stdout, re.MULTILINE)
    assert_prints("\n".join(results), PRINTED[path.stem])


def run_examples(paths, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # Settings that compile in less time; the flags an example sets are left to it.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    if paths[0] in ALONE:
        del environment["XLA_FLAGS"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, *paths],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for path in paths:
        if path.stem in PRINTED:
            assert_prints((tmp_path / path.stem).read_text(), PRINTED[path.stem])


def test_pages_say_what_their_program_prints():
    shown = set(EXAMPLES) - set(TORCH)  # docs/torch.md has the numbers of those
    programs = {path.stem for path in shown} - {"prune_a_checkpoint"}
    assert set(PRINTED) == programs


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_an_example_is_a_page_and_listed(path):
    assert path.read_text().count("\n") < MOST_LINES
    assert f"({path.name})" in (ROOT / "examples" / "README.md").read_text()
