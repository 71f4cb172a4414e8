"""The networks on digits: what is removed, and that the rows compare like with like."""

import importlib.util

import jax
import pytest

from benchmarks import digits_structure
from benchmarks.digits_structure import Config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"
)

CONFIG = Config(
    shares=(0.5,), steps=60, retraining=30, seeds=(0,), calibrated=128, timed=8
)


@pytest.fixture(scope="module")
def data():
    return digits_structure.read()


@pytest.mark.full
@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_each_candidate_has_the_shape_of_what_is_built_and_learns(
    network, data, monkeypatch
):
    monkeypatch.setattr(digits_structure, "LAYERS", 1)
    shapes = jax.tree.map(
        lambda leaf: leaf.shape, digits_structure.built(CONFIG, network, 0.5, 0).params
    )
    shrink, methods = digits_structure.shrunk, []

    def shrunk(config, whole, method, *rest):
        run = shrink(config, whole, method, *rest)
        assert jax.tree.map(lambda leaf: leaf.shape, run.params) == shapes
        methods.append(method)
        return run

    monkeypatch.setattr(digits_structure, "shrunk", shrunk)
    accuracies = digits_structure.compared(CONFIG, network, 0, data)
    assert methods == list(digits_structure.METHODS)
    assert list(accuracies) == [
        "0 dense",
        *(f"0.5 {name}" for name in (*digits_structure.METHODS, "built")),
    ]
    sizes = [cell["parameters"] for cell in accuracies.values()]
    assert len({*sizes[1:]}) == 1
    assert sizes[1] < sizes[0]
    assert all(cell["after"] > 0.5 for cell in accuracies.values())


def test_a_row_is_a_mean_and_a_spread():
    cell = {"before": [0.5, 0.7], "after": [0.8, 0.8], "parameters": [1234.0, 1234.0]}
    rows = digits_structure.accuracies({"cnn": {"0.25 built": cell}}).splitlines()
    assert rows[2] == "| cnn | 25% | built | 60.0 ± 14.1 | 80.0 ± 0.0 | 1,234 |"
