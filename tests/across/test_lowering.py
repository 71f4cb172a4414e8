"""Every program lowers for GPU and TPU, on a machine that has neither."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from experiments.phi3_vision import checkpoint, presets
from jaxprune.lm.models import generate, hf
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.recovery import distill, retrain
from jaxprune.posttraining.solvers import alps, sparsegpt, units
from tests.support import tiny_families, tiny_hf
from tests.support.small_models import correlated, draw

pytestmark = pytest.mark.jax_api

PARAMS = {"up": {"kernel": draw(0, 8, 16), "bias": draw(1, 16)}, "down": draw(2, 16, 8)}
EVENTS = {1: 0.25, 2: 0.5}
TRANSFORMATIONS = {
    "keep_masks": lambda: jp.keep_masks(optax.adamw(1e-3), _masks()),
    "gradual": lambda: jp.gradual(optax.adamw(1e-3), EVENTS),
    "gradual, packed": lambda: jp.gradual(
        optax.adamw(1e-3), EVENTS, packed=True, grow=jp.grow.gradient()
    ),
    "straight_through": lambda: jp.straight_through(
        optax.adamw(1e-3), EVENTS, freeze=3
    ),
    "lora": lambda: jp.contrib.lora(optax.adamw(1e-3), rank=2),
    "tracked": lambda: optax.chain(
        jp.track_gradients(average=("square", "taylor")),
        optax.adamw(1e-3),
        jp.track_importance(average=("weight", "magnitude")),
    ),
    "tracked in int8": lambda: optax.chain(
        optax.adamw(1e-3), jp.track_importance(storage="int8")
    ),
}
PATTERNS = ["unstructured", "per-output", "2:4", "2x2", "channel"]
X = correlated(0, 64, 16)
HESSIAN = (X.T @ X / 64).astype(np.float32)


# One of each other family; gpt-neox and the experts have "-" in their names.
PLAIN = {name for name in tiny_hf.CONFIGS if "-" not in name} - {"llama", "gemma3"}
REST = [
    pytest.param(name, marks=pytest.mark.full)
    for name in (*sorted(PLAIN), "gpt-neox", *tiny_families.MIXTURES)
]


def _masks():
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), PARAMS)


def lowered(function, *args):
    """The program for both; a kernel that one of them lacks is an error."""
    exported = jax.export.export(jax.jit(function), platforms=("cuda", "tpu"))(*args)
    assert exported.platforms == ("cuda", "tpu")
    return exported


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_training_step(name):
    tx = TRANSFORMATIONS[name]()

    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    lowered(step, params, jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("allocation", ["layer", "global"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruning(pattern, allocation):
    share = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    scores = jp.scores.magnitude(PARAMS)
    lowered(lambda p, s: jp.prune(p, s, share, **how), PARAMS, scores)


@pytest.mark.parametrize(
    "solve",
    [
        functools.partial(sparsegpt.solve, kept=64),
        functools.partial(sparsegpt.solve, kept=64, pattern=jp.patterns.NM(2, 4)),
        functools.partial(alps.solve, kept=64),
        functools.partial(
            units.remove, units=np.arange(16).reshape(8, 2), lost=3, at_once=1
        ),
    ],
    ids=["sparsegpt", "sparsegpt, 2:4", "alps", "units"],
)
def test_a_solver(solve):
    lowered(lambda weight, hessian: solve(weight, hessian), draw(3, 16, 8), HESSIAN)


def test_every_score_and_what_is_done_with_masks():
    def everything(params, importance):
        found = [
            criterion(params, importance)
            for criterion in (
                jp.scores.magnitude,
                jp.scores.averaged_weight,
                jp.scores.averaged_magnitude,
                jp.scores.obd,
                jp.scores.preconditioned_magnitude,
                jp.scores.taylor,
                jp.scores.random,
                jp.scores.threshold,
            )
        ]
        masks = jp.masks.above(found[0], 0.5)
        both = jp.masks.combine(masks, jp.masks.make(found[4], 0.5))
        packed = jp.masks.unpack(jp.masks.pack(both))
        return found, jp.masks.apply(params, packed)

    lowered(everything, PARAMS, jp.Importance(*[PARAMS] * 4))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_averages_in_and_out_of_their_storage(storage):
    tx = jp.track_importance(storage=storage, average=("weight", "magnitude"))
    params = jax.tree.map(jnp.asarray, PARAMS)

    def read(state):
        return jax.tree.map(jp.low_bit.decode, jp.get_importance(state).weight["down"])

    lowered(read, tx.init(params))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_method(method, pattern):
    method, pattern = jp.passes.METHODS[method](), jp.patterns.parse(pattern)

    def pruned(weight, square, kept):
        matrix = jp.passes.Matrix(weight, square, None, kept, pattern)
        return method.solve(matrix)

    square = np.ones(16, np.float32)
    lowered(pruned, draw(3, 16, 8), square, np.uint32(64))


def test_the_updates_of_a_given_mask():
    mask = draw(3, 16, 8) > 0

    def updated(weight, hessian, mask):
        own = weight, hessian, mask
        return sparsegpt.update(*own).weight, alps.refine(*own)

    lowered(updated, draw(3, 16, 8), HESSIAN, mask)


class Programs:
    """`jax.jit` that also lowers what it is given, when that is called first."""

    def __init__(self):
        self.names, self.jit = [], jax.jit

    def __call__(self, function, **options):
        program, seen = self.jit(function, **options), []

        def call(*arguments):
            if not (seen or isinstance(jnp.zeros(()), jax.core.Tracer)):
                seen.append(function)
                jax.export.export(program, platforms=("cuda", "tpu"))(*arguments)
                self.names.append(getattr(function, "__qualname__", str(function)))
            return program(*arguments)

        call.lower = program.lower
        return call


@pytest.fixture
def programs(monkeypatch):
    found = Programs()
    monkeypatch.setattr(jax, "jit", found)
    return found


def attention(params, x):
    """Several uses of an input, a softmax, and experts."""
    y = jax.nn.softmax(jnp.einsum("bd,cd->bc", x @ params["q"], x @ params["k"])) @ x
    z = jax.lax.ragged_dot(y, params["grouped"], jnp.array([9, 20]))
    return jnp.einsum("bd,edf->ebf", jnp.tanh(y), params["experts"]) + z[None]


WEIGHTS = {
    "q": draw(4, 16, 8),
    "k": draw(5, 16, 8),
    "experts": draw(6, 4, 16, 8),
    "grouped": draw(8, 2, 16, 8),
}
INPUTS = [correlated(i, 32, 16) for i in range(8)]


@pytest.mark.full
def test_prune_trained_is_compiled_for_each_platform(programs):
    options = {"sparsity": 0.5}
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    method = jp.passes.wanda()
    jp.prune_trained(attention, params, INPUTS[:2], method=method, **options)
    assert sum("Subgraph.run" in name for name in programs.names) >= 2


@pytest.mark.full
def test_what_each_device_of_a_mesh_runs(programs):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    # Settings of no other test: what is compiled already is not compiled again.
    method = jp.passes.alps(damping=0.03)
    options = {"sparsity": 0.5, "mesh": mesh}
    jp.prune_trained(attention, WEIGHTS, INPUTS, method=method, **options)
    # Of one device, as `PerDevice.compiled` makes it: model, sums, solvers.
    assert sum("PerDevice.compiled" in name for name in programs.names) >= 4
    assert any("_finishing" in name for name in programs.names)
    assert any("_taking" in name for name in programs.names)


@pytest.mark.full
def test_a_training_after_a_teacher(programs):
    config = hf.decoder_config(tiny_hf.config_json("llama"))
    model = Decoder(config, rngs=nnx.Rngs(0))
    names = {
        name
        for name in jp.tree.named_leaves(nnx.state(model, nnx.Param))
        if name.endswith("up/kernel")
    }
    settings = retrain.Settings(steps=1, learning_rate=1e-4, batch=2, seed=0)
    teacher = distill.from_teacher(Decoder(config, rngs=nnx.Rngs(1)), hidden=1.0)
    sequences = np.zeros((2, 8), np.int32)
    retrain.retrain(model, names, sequences, settings, loss=teacher)
    found = programs.names
    assert any(name.endswith("_step.<locals>.step") for name in found)


@pytest.mark.parametrize("family", ["llama", "gemma3", *REST])
def test_a_decoder_and_what_it_writes(family):
    config = hf.decoder_config(tiny_hf.config_json(family))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    tokens = np.zeros((2, 8), np.int32)
    lowered(lambda state, x: nnx.merge(graph, state)(x), state, tokens)

    def written(state, prompt, key):
        own = nnx.merge(graph, state)
        return generate.generate(own, prompt, steps=4, key=key)

    lowered(written, state, tokens, jax.random.key(0))


@pytest.mark.full
def test_a_model_that_sees_pictures():
    config = checkpoint.vision_config(presets.PRESETS["smoke"])
    graph, state = nnx.split(checkpoint.abstract(config))
    size = config.tower.image
    pixels = np.zeros((2, size, size, 3), np.float32)
    tokens, sources = np.zeros((2, 8), np.int32), np.full((2, 8), -1, np.int32)
    lowered(lambda p, *of: nnx.merge(graph, p)(*of), state, tokens, pixels, sources)


def test_what_is_left_of_a_function_after_shrinking():
    def network(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]

    params = jax.tree.map(jnp.asarray, PARAMS)
    x = jnp.ones((4, 8))
    small = jp.shrink(network, params, [x], jp.scores.magnitude, 0.5)
    assert small.params["down"].shape == (8, 8)
    exported = lowered(small.fn, small.params, x)
    assert [o.shape for o in exported.out_avals] == [(4, 8)]


def test_a_program_that_one_of_them_lacks_is_found():
    with pytest.raises(NotImplementedError, match="MLIR translation rule"):
        lowered(lambda x: jax.lax.linalg.schur(x), np.eye(3, dtype=np.float32))
