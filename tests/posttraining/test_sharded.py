"""Eight devices give what one gives, and leaves stay in place."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from tests.support import resumed, small_models
from tests.support.small_models import correlated, draw
from tests.support.small_models import quick_compilation as quick_compilation

pytestmark = pytest.mark.jax_api

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
PARAMS = {"up": draw(0, 16, 16) / 3, "bias": draw(1, 16), "down": draw(2, 16, 16) / 3}
BATCHES = [correlated(i, 16, 16) / 3 for i in range(2)]

# How each leaf lies on a mesh of data=2, model=4.
LAYOUTS = {
    "fsdp": {
        "up": P(("data", "model"), None),
        "bias": P(None),
        "down": P(None, ("data", "model")),
    },
    "tensor parallel": {
        "up": P(None, "model"),
        "bias": P("model"),
        "down": P("model", None),
    },
    "both": {
        "up": P("data", "model"),
        "bias": P("model"),
        "down": P("model", "data"),
    },
}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def whole(p, x):
    """The model as anybody writes it."""
    return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


def gathered(p, x):
    """The model that gathers each weight for its product, as Explicit axes ask for."""
    p = {k: jax.sharding.reshard(w, P(*[None] * w.ndim)) for k, w in p.items()}
    return whole(p, x)


def parallel(p, x):
    """The model that says where a sharded sum comes together."""
    x = jnp.tanh(x @ p["up"] + p["bias"][None])
    return jnp.einsum("bi,io->bo", x, p["down"], out_sharding=P("data", None))


EXPLICIT = {"fsdp": gathered, "tensor parallel": parallel, "both": gathered}


def place(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def prune(fn, params, batches, method="wanda", **options):
    options = {"sparsity": 0.5, "method": method} | options
    return small_models.prune(fn, params, batches, **options)


def in_mesh(kind, mesh):
    """Explicit axes need their mesh to be set, for the model itself to run."""
    return jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext()


@functools.cache
def alone(method):
    """What one device gives."""
    return prune(whole, PARAMS, BATCHES, method)


def stays(before, after):
    """Each leaf lies where it lay, and no device holds more of it than before."""
    for name, leaf in before.items():
        assert after[name].sharding == leaf.sharding
        shards = [s.data.shape for s in after[name].addressable_shards]
        assert shards == [s.data.shape for s in leaf.addressable_shards]
        assert after[name].dtype == leaf.dtype


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("auto", "fsdp"),
        ("auto", "tensor parallel"),
        ("explicit", "tensor parallel"),
        ("explicit", "both"),
    ],
)
def test_sharded_weights_are_pruned_like_whole_ones_and_stay_sharded(kind, layout):
    mesh = mesh_of(kind)
    params = place(mesh, PARAMS, LAYOUTS[layout])
    batches = [place(mesh, x, P("data", None)) for x in BATCHES]
    fn = EXPLICIT[layout] if kind == "explicit" else whole
    with in_mesh(kind, mesh):
        pruned, report = prune(fn, params, batches)
    stays(params, pruned)
    assert not pruned["up"].is_fully_replicated
    assert not pruned["down"].is_fully_replicated
    for name in ("up", "down"):
        np.testing.assert_array_equal(pruned[name], alone("wanda").params[name])
    assert pruned["bias"] is params["bias"]
    for row, expected in zip(
        report["weights"], alone("wanda").report["weights"], strict=True
    ):
        assert row["zeros"] == expected["zeros"]
        np.testing.assert_allclose(row["error"], expected["error"], rtol=1e-4)


@pytest.mark.full
def test_reconstruction_on_a_mesh_is_that_on_one_device():
    mesh = mesh_of("explicit")
    params = place(mesh, PARAMS, LAYOUTS["tensor parallel"])
    batches = [place(mesh, x, P("data", None)) for x in BATCHES]
    with jax.set_mesh(mesh):
        pruned, _ = prune(parallel, params, batches, "sparsegpt")
    stays(params, pruned)
    for name in ("up", "down"):
        expected = np.asarray(alone("sparsegpt").params[name])
        got = np.asarray(pruned[name])
        np.testing.assert_array_equal(got == 0, expected == 0)
        # Sums in another order, multiplied by the Hessian's condition.
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.full
def test_groups_that_shards_cut_are_kept_whole():
    # 16 inputs on 8 devices: two of a group of four on each.
    mesh = mesh_of("auto")
    specs = LAYOUTS["tensor parallel"] | {"down": P(("data", "model"), None)}
    params = place(mesh, PARAMS, specs)
    options = {"pattern": jp.patterns.NM(2, 4), "sparsity": None}
    batches = [place(mesh, BATCHES[0], P("data", None))]
    expected, _ = prune(whole, PARAMS, BATCHES[:1], **options)
    pruned, _ = prune(whole, params, batches, **options)
    stays(params, pruned)
    for name in ("up", "down"):
        np.testing.assert_array_equal(pruned[name], expected[name])


@pytest.mark.full
def test_stacked_layers_stay_sharded():
    stack = {"up": draw(3, 2, 16, 16) / 3, "down": draw(4, 2, 16, 16) / 3}

    def fn(p, x):
        def layer(x, own):
            return x + jnp.tanh(x @ own["up"]) @ own["down"], None

        return jax.lax.scan(jax.checkpoint(layer), x, p)[0]

    mesh = mesh_of("auto")
    specs = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}
    params = place(mesh, stack, specs)
    batches = [place(mesh, x, P("data", None)) for x in BATCHES]
    expected, _ = prune(fn, stack, BATCHES)
    pruned, _ = prune(fn, params, batches)
    stays(params, pruned)
    for name in stack:
        np.testing.assert_array_equal(pruned[name], expected[name])
        # The old leaves are still there.
        np.testing.assert_array_equal(params[name], stack[name])


@pytest.mark.full
def test_experts_on_devices_of_their_own_stay_there():
    weight, x = draw(5, 4, 8, 6), draw(6, 4, 10, 8)
    mesh = mesh_of("auto")

    def fn(p, x):
        return jnp.einsum("end,edf->enf", x, p["w"])

    params = place(mesh, {"w": weight}, {"w": P("model", None, None)})
    batch = place(mesh, x, P("model", None, None))
    pruned, _ = prune(fn, params, [batch])
    stays(params, pruned)
    np.testing.assert_array_equal(
        pruned["w"], prune(fn, {"w": weight}, [x]).params["w"]
    )


@pytest.mark.full
def test_a_job_on_a_mesh_is_resumed_from_its_directory(tmp_path, monkeypatch):
    mesh = mesh_of("auto")
    found = resumed.reads(monkeypatch)
    batches = [place(mesh, x, P("data", None)) for x in BATCHES]
    for layout in ("tensor parallel", "both"):  # read back onto another layout
        params = place(mesh, PARAMS, LAYOUTS[layout])
        found.clear()
        pruned, _ = prune(whole, params, batches, directory=tmp_path)
        stays(params, pruned)
        np.testing.assert_array_equal(pruned["up"], alone("wanda").params["up"])
        assert {*found} == {layout == "both"}


@pytest.mark.full
def test_units_are_removed_as_on_one_device_and_leaves_stay_in_place():
    mesh = mesh_of("auto")
    placed = {
        name: jax.device_put(PARAMS[name], NamedSharding(mesh, spec))
        for name, spec in LAYOUTS["tensor parallel"].items()
    }
    solver = jp.passes.sparsegpt(relative=True)
    alone, found = (jp.shrink(whole, p, BATCHES, solver, 0.5) for p in (PARAMS, placed))
    assert found.report["kept"] == alone.report["kept"]
    for name, leaf in found.params.items():
        np.testing.assert_allclose(leaf, alone.params[name], rtol=1e-4, atol=1e-5)
        assert leaf.sharding.spec == LAYOUTS["tensor parallel"][name]
