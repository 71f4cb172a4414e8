"""Over a mesh each device takes a batch, then a matrix; no bit of a mask changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.arrays.per_device import PerDevice
from jaxprune.posttraining import solve_weight
from jaxprune.posttraining.pipeline import sums
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.progress import ProgressLog
from tests.across.test_sharding_hlo import ARRAY, COLLECTIVE, size
from tests.support import small_models
from tests.support.small_models import correlated, draw
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs the eight CPU devices of conftest.py"
)

LAYERS, WIDTH, EXPERT = 2, 16, 24
SHAPES = {
    "queries": (LAYERS, WIDTH, WIDTH),
    "keys": (LAYERS, WIDTH, WIDTH),
    "up": (LAYERS, WIDTH, WIDTH),
    "down": (LAYERS, WIDTH, WIDTH),
    "experts": (4, WIDTH, EXPERT),
}
PARAMS = {k: draw(i, *shape) / 4 for i, (k, shape) in enumerate(SHAPES.items())}
BATCHES = [correlated(i, 2 * 12, WIDTH).reshape(2, 12, WIDTH) for i in range(16)]
MESHES = {"8": ((8,), ("fsdp",)), "2x4": ((2, 4), ("data", "fsdp"))}


def fn(params, x):
    """Attention, a perceptron, and four experts that see all samples."""
    for i in range(LAYERS):
        queries, keys = x @ params["queries"][i], x @ params["keys"][i]
        x = x + jax.nn.softmax(jnp.einsum("bid,bjd->bij", queries, keys)) @ x
        x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return jnp.einsum("bsd,edf->besf", x, params["experts"])


def mesh_of(name, kind=AxisType.Auto):
    sizes, names = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def placed(mesh, params=PARAMS):
    """Each leaf split along its last axis by "fsdp"."""
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, P(None, None, "fsdp")))
        for name, leaf in params.items()
    }


def prune(params, method="wanda", **options):
    return small_models.prune(fn, params, BATCHES, method, **options)


@functools.cache
def alone(method, allocation="layer"):
    return prune(PARAMS, method, allocation=allocation)


@pytest.mark.parametrize(
    ("mesh", "method", "allocation"),
    [
        ("8", "wanda", "layer"),
        ("2x4", "ria", "layer"),
        ("8", "sparsegpt", "layer"),
        ("2x4", "sparsegpt", "owl"),
        ("2x4", "alps", "layer"),
    ],
)
@pytest.mark.full
def test_every_bit_is_that_of_one_device(mesh, method, allocation):
    mesh = mesh_of(mesh)
    params = placed(mesh)
    found = prune(params, method, allocation=allocation, mesh=mesh)
    expected = alone(method, allocation)
    assert same_bits(found.params, expected.params)
    for name, leaf in params.items():
        assert found.params[name].sharding == leaf.sharding
    for own, other in zip(
        found.report["weights"], expected.report["weights"], strict=True
    ):
        own, other = ({**row, "seconds": 0} for row in (own, other))
        assert own.pop("error") == pytest.approx(other.pop("error"), rel=1e-5)
        assert own == other
    assert found.report["programs"] == expected.report["programs"]


@pytest.mark.full
def test_experts_that_are_given_rows_of_their_own():
    def routed(params, x):
        rows = x.reshape(-1, WIDTH)
        chosen = jnp.argmax(rows[:, :4], axis=-1)
        sizes = jnp.bincount(chosen, length=4)
        return jax.lax.ragged_dot(rows[jnp.argsort(chosen)], params["experts"], sizes)

    own = {"experts": PARAMS["experts"]}
    options = {"method": "sparsegpt", "sparsity": 0.5}
    expected = jp.prune_trained(routed, own, BATCHES, **options)
    mesh = mesh_of("8")
    found = jp.prune_trained(routed, placed(mesh, own), BATCHES, mesh=mesh, **options)
    assert same_bits(found.params, expected.params)
    (row,), (other,) = found.report["weights"], expected.report["weights"]
    assert row["error"] == pytest.approx(other["error"], rel=1e-5)
    assert 0 < row["error"] < 0.5


@pytest.mark.full
def test_positions_that_do_not_count_are_those_of_each_batch():
    def positions(x):
        return jnp.abs(x[..., 0]) < 1

    mesh = mesh_of("8")
    expected = prune(PARAMS, "sparsegpt", positions=positions)
    found = prune(placed(mesh), "sparsegpt", positions=positions, mesh=mesh)
    assert same_bits(found.params, expected.params)
    assert found.report["samples"] == expected.report["samples"] < 16 * 24


@pytest.mark.full
def test_methods_of_the_dense_layer_and_parameters_that_one_device_has():
    method = jp.passes.wanda(inputs="dense", relative=True)
    expected = prune(PARAMS, method)
    assert same_bits(prune(PARAMS, method, mesh=mesh_of("8")).params, expected.params)


@pytest.mark.full
def test_statistics_are_those_of_one_device():
    found = jp.calibrate(fn, PARAMS, BATCHES, hessian=True, mesh=mesh_of("2x4"))
    expected = jp.calibrate(fn, PARAMS, BATCHES, hessian=True)
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        for one, other in zip(found[name], own, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.full
def test_a_killed_job_goes_on_over_another_layout(tmp_path, monkeypatch):
    write, done = ProgressLog.write, []

    def dies(self, number, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        write(self, number, *arguments)

    mesh = mesh_of("2x4")
    monkeypatch.setattr(ProgressLog, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(placed(mesh), mesh=mesh, directory=tmp_path)
    monkeypatch.setattr(ProgressLog, "write", write)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("segment*")}
    assert len(kept) == 6
    mesh = mesh_of("8")
    found = prune(placed(mesh), mesh=mesh, directory=tmp_path)
    assert same_bits(found.params, alone("wanda").params)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


@pytest.mark.full
def test_a_batch_and_a_matrix_stay_where_they_are(monkeypatch):
    """What the devices send each other, by what the compiled programs say."""
    programs, compiled = {}, PerDevice.compiled

    def recorded(self, function, own):
        program = compiled(self, function, own)

        def call(*arguments):
            name = getattr(function, "__qualname__", "")
            kinds = id(program), str(jax.tree.map(jnp.shape, arguments))
            texts = programs.setdefault(name, {})
            if kinds not in texts:
                texts[kinds] = program.lower(*arguments).compile().as_text()
            return program(*arguments)

        return call

    monkeypatch.setattr(PerDevice, "compiled", recorded)
    mesh = mesh_of("2x4")
    # Or what another test has made is not made again, and not recorded.
    sums._adding.cache_clear()
    solve_weight._solving.cache_clear()
    prune(placed(mesh), "sparsegpt", mesh=mesh)
    sent = {
        name: [
            (operation, max(size(*array) for array in ARRAY.findall(result)))
            for text in texts.values()
            for result, operation in COLLECTIVE.findall(text)
        ]
        for name, texts in programs.items()
    }
    run = next(name for name in sent if name.endswith("Subgraph.run"))
    solve = next(name for name in sent if "_solving" in name)
    assert (sent[run], sent[solve]) == ([], [])
    add = next(name for name in sent if "_adding" in name)
    assert {operation for operation, _ in sent[add]} == {"all-to-all"}
    # No more than the largest sums themselves: those of four experts' inputs.
    assert max(bytes for _, bytes in sent[add]) <= 4 * 4 * WIDTH * WIDTH


@pytest.mark.full
def test_no_device_holds_more_than_its_share_and_a_segment(monkeypatch):
    rows, layers = 8, 12
    shape = (layers, 64, 64)
    params = {"w": np.asarray(draw(0, *shape)) / 8}

    def deep(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p["w"][i])
        return x

    batches = [draw(i, rows, 64) for i in range(8)]
    mesh = mesh_of("8")
    own = jax.device_put(params["w"], NamedSharding(mesh, P(None, None, "fsdp")))
    held, observe = [], SequentialPipeline.observe

    def observed(self, *arguments):
        found = observe(self, *arguments)
        held.append(bytes_on(jax.devices()[3]))
        return found

    monkeypatch.setattr(SequentialPipeline, "observe", observed)
    options = {"method": "wanda", "sparsity": 0.5}
    before = bytes_on(jax.devices()[3])
    found = jp.prune_trained(deep, {"w": own}, batches, mesh=mesh, **options)
    one, whole = 4 * 64 * 64, 4 * layers * 64 * 64
    # Old and new parameters, an eighth of each; two matrices; activations and sums.
    assert len(held) == layers
    assert max(held) - before < whole / 8 + 2 * one + 8 * 4 * rows * 64 < whole / 2
    # The first matrix by hand: of each output's 64 weights the 32 lowest go.
    rms = np.sqrt(np.mean(np.square(np.concatenate(batches), dtype=np.float64), 0))
    scores = np.abs(params["w"][0]) * rms[:, None]
    kept = np.argsort(np.argsort(scores, axis=0), axis=0) >= 32
    np.testing.assert_array_equal(np.asarray(found.params["w"])[0] != 0, kept)


def bytes_on(device):
    """Of all arrays that there are, each buffer once: a shard looked at is an array."""
    arrays = (x for x in jax.live_arrays() if device in x.devices())
    shards = (shard for x in arrays for shard in x.addressable_shards)
    own = (shard.data for shard in shards if shard.device == device)
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in own}.values())


def test_batches_that_devices_cannot_take_one_each_are_refused(tmp_path):
    with pytest.raises(ValueError, match="number of batches divisible by 8, got 6"):
        jp.prune_trained(
            fn, PARAMS, BATCHES[:6], "wanda", sparsity=0.5, mesh=mesh_of("8"),
            directory=tmp_path,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_parameters_of_explicit_axes_are_refused():
    mesh = mesh_of("8", AxisType.Explicit)
    with pytest.raises(ValueError, match=r"Auto axes, but that of 'down', .* has Exp"):
        prune(placed(mesh), mesh=mesh)


def gated(params, x):
    """Three experts of two weights that read one input; each a third of the rows."""
    each = x.reshape(3, -1, WIDTH)
    gate = jnp.einsum("etd,edf->etf", each, params["gate"])
    return jax.nn.silu(gate) * jnp.einsum("etd,edf->etf", each, params["up"])


@pytest.mark.full
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_of_two_weights_are_pruned_by_their_own_inputs(method):
    # Two devices take three experts of each weight: some take one of either.
    params = {k: draw(i, 3, WIDTH, 6) for i, k in enumerate(("gate", "up"))}
    size = np.repeat(np.exp(2 * draw(2, 3, WIDTH)), 8, axis=0)
    batches = [draw(i, 24, WIDTH) * size for i in range(3, 7)]
    prune = functools.partial(
        jp.prune_trained, gated, params, batches, method=method, sparsity=0.5
    )
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    expected, found = prune().params, prune(mesh=mesh).params
    for name in params:
        np.testing.assert_array_equal(
            found[name] != 0, np.asarray(expected[name]) != 0, err_msg=name
        )


def test_positions_of_another_shape_are_refused_over_a_mesh_too():
    params, batches = {"w": draw(0, WIDTH, 4)}, [draw(i, 1, 8, WIDTH) for i in (1, 2)]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    for shape in ((1,), (8, 1)):
        with pytest.raises(ValueError, match="positions"):
            jp.calibrate(
                lambda p, x: x @ p["w"],
                params,
                batches,
                positions=lambda batch, shape=shape: np.ones(shape, bool),
                mesh=mesh,
            )
