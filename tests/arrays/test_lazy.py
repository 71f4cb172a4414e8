"""Leaves that stay in their file: the same bits, in the memory of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.arrays import lazy
from tests.support import small_models
from tests.support.small_models import chain, correlated, kernels_of, run_chain
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

pytestmark = pytest.mark.jax_api

WIDTHS = [6, 6, 6, 6]
PARAMS = chain(WIDTHS)
BATCHES = [correlated(i, 24, 6) / 3 for i in range(2)]


class Shelf:
    """A tree whose leaves are read one by one, and how many are out at a time."""

    def __init__(self, params):
        self.reads = []
        self.params = jax.tree_util.tree_map_with_path(self._stored, params)

    def _stored(self, path, leaf):
        host = np.asarray(leaf)

        def read():
            self.reads.append(jax.tree_util.keystr(path))
            return jax.device_put(jnp.array(host), leaf.sharding)

        return jp.LazyArray(host.shape, host.dtype, read, leaf.sharding)


def prune(fn, params, batches=BATCHES, method="sparsegpt", sparsity=0.5, **options):
    return small_models.prune(fn, params, batches, method, sparsity, **options)


def held(tree):
    return [x for x in jax.tree.leaves(tree) if not isinstance(x, jp.LazyArray)]


def test_a_lazy_array_says_its_shape():
    leaf = jp.LazyArray((2, 3), np.dtype(np.float32), lambda: jnp.ones((2, 3)))
    assert (leaf.ndim, leaf.size) == (2, 6)
    assert lazy.array(leaf).tolist() == [[1] * 3] * 2
    assert lazy.array(3) == 3


@pytest.mark.full
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda", "alps"])
def test_the_bits_are_those_of_arrays(method, tmp_path):
    expected = prune(run_chain, PARAMS, method=method)
    found = prune(run_chain, Shelf(PARAMS).params, method=method, directory=tmp_path)
    assert not held(found.params)
    assert same_bits(lazy.loaded(found.params), expected.params)


@pytest.mark.full
@pytest.mark.parametrize(
    "shares",
    [
        pytest.param(jp.allocation.ERK(), marks=pytest.mark.full),
        jp.allocation.OWL(factor=1.5),
    ],
)
def test_an_allocation_reads_what_it_needs(shares, tmp_path):
    options = {"method": "wanda", "sparsity": 0.4, "allocation": shares}
    expected = prune(run_chain, PARAMS, **options)
    found = prune(run_chain, Shelf(PARAMS).params, directory=tmp_path, **options)
    assert same_bits(lazy.loaded(found.params), expected.params)


def test_without_a_folder_the_pruned_leaves_are_arrays():
    expected = prune(run_chain, PARAMS, method="magnitude")
    found = prune(run_chain, Shelf(PARAMS).params, method="magnitude")
    assert len(held(found.params)) == len(kernels_of(PARAMS))
    assert same_bits(lazy.loaded(found.params), expected.params)


def test_the_trace_reads_nothing():
    shelf = Shelf(PARAMS)
    seen = jp.trace(run_chain, shelf.params, BATCHES[0])
    expected = jp.trace(run_chain, PARAMS, BATCHES[0])
    assert [p.name for p in seen.linear_ops] == [p.name for p in expected.linear_ops]
    assert not shelf.reads


def test_calibration_is_that_of_arrays():
    expected = jp.calibrate(run_chain, PARAMS, BATCHES, hessian=True)
    found = jp.calibrate(run_chain, Shelf(PARAMS).params, BATCHES, hessian=True)
    assert same_bits(found, expected)


@pytest.mark.full
def test_memory_holds_a_layer_and_not_the_model(tmp_path):
    wide, most = 64, []
    eye = np.eye(wide, dtype=np.float32)
    params = [jnp.asarray(eye * (1 + i / 8)) for i in range(12)]

    def fn(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return x

    def leaf(i):
        host = np.asarray(params[i])

        def read():
            shapes = [x.shape for x in jax.live_arrays()]
            most.append(shapes.count((wide, wide)) - before)
            return jnp.array(host)

        return jp.LazyArray(host.shape, host.dtype, read)

    tree = [leaf(i) for i in range(len(params))]
    batches = [np.asarray(correlated(0, 8, wide))]
    before = sum(x.shape == (wide, wide) for x in jax.live_arrays())
    prune(fn, tree, batches, method="wanda", directory=tmp_path)
    assert len(most) == 2 * len(params)  # once to be looked at, once to be pruned
    # The layer before, for the way to the next input, and what is being pruned.
    assert max(most) <= 4


@pytest.mark.full
def test_parts_of_one_leaf_go_back_to_it(tmp_path):
    params = {"qkv": jnp.asarray(np.random.default_rng(0).normal(size=(6, 12)), "f4")}

    def fn(params, x):
        first, second = jnp.split(params["qkv"], 2, axis=1)
        return jnp.tanh(x @ first) @ second

    expected = prune(fn, params)
    found = prune(fn, Shelf(params).params, directory=tmp_path)
    assert not held(found.params)
    assert same_bits(lazy.loaded(found.params), expected.params)


def test_a_killed_walk_goes_on(tmp_path):
    whole = prune(run_chain, Shelf(PARAMS).params, directory=tmp_path)
    records = sorted(tmp_path.glob("segment_*.json"))
    for path in records[2:]:
        path.unlink()
    again = prune(run_chain, Shelf(PARAMS).params, directory=tmp_path)
    assert same_bits(lazy.loaded(again.params), lazy.loaded(whole.params))
    assert again.report["weights"][:2] == whole.report["weights"][:2]


def test_a_lazy_array_must_be_finite(tmp_path):
    wrong = jax.tree.map(np.array, PARAMS)
    wrong["layer_0"]["kernel"][0] = np.nan
    wrong = jax.tree.map(jnp.asarray, wrong)
    with pytest.raises(ValueError, match="finite"):
        prune(run_chain, Shelf(wrong).params, directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.full
@pytest.mark.parametrize("kind", [pytest.param(AUTO, marks=pytest.mark.full), EXPLICIT])
def test_each_device_gets_its_part(kind, tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    where = jax.NamedSharding(mesh, jax.P(None, "data"))
    params = [jax.device_put(k, where) for k in kernels_of(chain([8, 8, 8]))]
    alone = jax.NamedSharding(mesh, jax.P())
    batches = [jax.device_put(correlated(0, 24, 8) / 3, alone)]

    def fn(params, x):
        for kernel in params:
            x = jnp.tanh(jnp.dot(x, kernel, out_sharding=alone))
        return x

    with jax.set_mesh(mesh):
        expected = prune(fn, params, batches)
        found = prune(fn, Shelf(params).params, batches, directory=tmp_path)
    leaves = lazy.loaded(found.params)
    assert [x.sharding for x in leaves] == [where] * 2
    assert same_bits(leaves, expected.params)
