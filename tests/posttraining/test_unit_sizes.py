"""Groups at several sizes, solved once: beside `jp.shrink` of one size."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining import unit_sizes
from jaxprune.posttraining.unit_sizes import solve_sizes
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

PARAMS = {
    f"layer{i}": {"up": draw(2 * i, 5, 8), "down": draw(2 * i + 1, 8, 5)}
    for i in (0, 1)
}
BATCHES = [draw(6, 40, 5), draw(7, 40, 5)]
SIZES = [0, 2, 4, 6, 8]


def fn(params, x):
    for layer in params.values():
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def twice(params, x):
    """One layer at two depths, as ALBERT has it."""
    for _ in range(2):
        x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    return x


def solved(directory, sizes=SIZES, start=4, fn=fn, params=PARAMS):
    groups = jp.axis_groups(fn, params, BATCHES[0])
    names = [group.name for group in groups if group.default]
    sizes, start = dict.fromkeys(names, sizes), dict.fromkeys(names, start)
    return solve_sizes(
        fn, params, list(BATCHES), groups, sizes, start, directory=directory
    )


@pytest.mark.full
def test_at_the_start_every_group_is_as_shrink_solves_it(tmp_path):
    tables = solved(tmp_path / "work")
    settings = {"batches": list(BATCHES), "relative": True, "progress": False}
    one_size = jp.shrink(fn, PARAMS, BATCHES[0], sparsity=0.5, **settings)
    assert len(tables) == 2
    for name, table in tables.items():
        layer = table.leaf.split("/")[0]
        matrix, kept = table.read(4), one_size.report["kept"][name]
        np.testing.assert_array_equal(np.flatnonzero(matrix.any(1)), kept)
        down = one_size.params[layer]["down"]
        np.testing.assert_allclose(matrix[kept], down, rtol=1e-4, atol=1e-5)
        # All units are the weight itself, none is nothing; fewer cost more.
        np.testing.assert_array_equal(table.read(8), PARAMS[layer]["down"])
        assert not table.read(0).any()
        assert [np.count_nonzero(table.read(s).any(1)) for s in SIZES] == SIZES
        assert table.errors[0] == 1
        assert table.errors[-1] == 0
        assert np.all(np.diff(table.errors) < 0)


@pytest.mark.full
def test_what_was_solved_is_not_solved_again(tmp_path, monkeypatch):
    before = solved(tmp_path / "work")
    calls = []
    ladder = unit_sizes.unit_ladder.remove_to_sizes
    monkeypatch.setattr(
        unit_sizes.unit_ladder,
        "remove_to_sizes",
        lambda *a, **k: calls.append(1) or ladder(*a, **k),
    )
    damaged = next((tmp_path / "work").glob("weight_*.safetensors"))
    damaged.write_bytes(b"")  # cut short when the machine went down
    after = solved(tmp_path / "work")
    assert len(calls) == 1
    for name, table in before.items():
        assert table.errors == after[name].errors
        np.testing.assert_array_equal(table.read(2), after[name].read(2))


@pytest.mark.full
def test_nothing_and_all_units_are_sizes_without_any_between(tmp_path):
    for table in solved(tmp_path / "work", [0, 8], start=8).values():
        assert (table.sizes, table.errors) == ((0, 8), (1.0, 0.0))
        assert [np.count_nonzero(table.read(n).any(1)) for n in (0, 8)] == [0, 8]


@pytest.mark.full
def test_a_weight_is_solved_for_the_inputs_of_all_its_uses(tmp_path):
    layer = PARAMS["layer0"]
    (table,) = solved(tmp_path / "work", [4, 8], fn=twice, params=layer).values()
    settings = {"batches": list(BATCHES), "relative": True, "progress": False}
    one_size = jp.shrink(twice, layer, BATCHES[0], sparsity=0.5, **settings)
    (kept,) = one_size.report["kept"].values()
    matrix = table.read(4)
    np.testing.assert_array_equal(np.flatnonzero(matrix.any(1)), kept)
    np.testing.assert_allclose(
        matrix[kept], one_size.params["down"], rtol=1e-4, atol=1e-5
    )
