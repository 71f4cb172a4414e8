"""The compiled programs send no parameter between devices, however it is laid out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.arrays import placement
from jaxprune.arrays.topk.count_search import CANDIDATES
from jaxprune.masking import sparsity
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.full)]
LAYOUTS = {
    "fully sharded": P(("data", "model")),
    "rows": P("data"),
    "columns": P(None, "model"),
    "both": P("data", "model"),
    "stacked": P(None, "data", "model"),
    "replicated": P(),
}
SIZE = 256 * 256
# A packed mask is an eighth of this at one byte a weight, its shards an eighth again;
# what may move is smaller: counts, a channel's mean, a leaf's deviation.
BOUND = SIZE // 16

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|"
    r"collective-broadcast)(?:-start)?\("
)
SORT = re.compile(r"= \w+\[([\d,]+)\]\S* sort\(.*? dimensions=\{(\d+)\}")
ANY_SORT = re.compile(r"\bsort\(")
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")

pytestmark = [
    pytest.mark.jax_api,
    pytest.mark.skipif(
        len(jax.devices()) < 8, reason="needs the eight CPU devices of conftest.py"
    ),
]


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def sent(program):
    """(operation, bytes on a device) of whatever the compiled program sends about."""
    text = program.as_text()
    # No leaf is sorted: all that ever is are the candidates of a pass, a row a leaf.
    sorts = SORT.findall(text)
    assert len(sorts) == len(ANY_SORT.findall(text))
    for shape, axis in sorts:
        assert shape.split(",")[int(axis)] == str(CANDIDATES), shape
    found = COLLECTIVE.findall(text)
    sizes = [[size(*array) for array in ARRAY.findall(result)] for result, _ in found]
    # An all-to-all lists the pieces of one array, others list arrays sent together.
    return [
        (operation, sum(each) if operation == "all-to-all" else max(each))
        for (_, operation), each in zip(found, sizes, strict=True)
    ]


def size(_, bits, shape):
    elements = np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)
    return -(-int(bits or 8) // 8) * int(elements)


def large(function, *arguments):
    return large_of(compiled(function, *arguments))


def large_of(program):
    return [item for item in sent(program) if item[1] >= BOUND]


def unsent(function, *arguments):
    """What the function returns, once its program is seen to send nothing large."""
    program = compiled(function, *arguments)
    assert large_of(program) == []
    return program(*arguments)


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def drawn(shape, seed=0):
    """Numbers with many ties."""
    values = np.random.default_rng(seed).normal(size=shape)
    return np.round(values, 1).astype(np.float32)


@pytest.fixture(params=KINDS, ids=str)
def mesh(request):
    return make_mesh(request.param)


@pytest.fixture
def params(mesh):
    return {
        name: jax.device_put(
            drawn((4, 128, 128) if name == "stacked" else (256, 256)),
            NamedSharding(mesh, spec),
        )
        for name, spec in LAYOUTS.items()
    }


def like(params, function):
    """What NumPy makes of the leaves, laid out as they are."""
    made = {name: function(np.asarray(leaf)) for name, leaf in params.items()}
    return jax.device_put(made, jax.tree.map(lambda leaf: leaf.sharding, params))


@pytest.fixture
def scores(params):
    return like(params, np.abs)


@pytest.fixture
def masks(params):
    return like(params, lambda leaf: np.abs(leaf) > 0.5)


def trackers(**options):
    return optax.chain(
        jp.track_gradients(average=("square", "taylor"), **options),
        optax.sgd(0.125),
        jp.track_importance(average=("weight", "magnitude"), **options),
    )


def test_the_probe_sees_what_is_gathered():
    mesh = make_mesh(AxisType.Auto)
    x = jax.device_put(drawn((256, 256)), NamedSharding(mesh, P("data")))
    everywhere = NamedSharding(mesh, P())
    gathered = lambda x: jax.lax.with_sharding_constraint(x * 2, everywhere)  # noqa: E731
    assert large(gathered, x) == [("all-gather", 4 * SIZE)]
    mask = np.asarray(x) > 0
    mask = jax.device_put(mask, NamedSharding(mesh, P(("data", "model"))))
    with pytest.raises(AssertionError):
        sent(compiled(lambda x: jnp.sort(x, axis=0), x))
    packed = lambda m: jnp.packbits(  # noqa: E731
        jax.lax.with_sharding_constraint(m, everywhere), axis=-1
    )
    assert large(packed, mask)


@pytest.mark.full
def test_scores(params):
    importance = jp.Importance(*[params] * 4)
    criteria = [
        jp.scores.magnitude,
        jp.scores.averaged_weight,
        jp.scores.averaged_magnitude,
        jp.scores.obd,
        jp.scores.preconditioned_magnitude,
        jp.scores.taylor,
        jp.scores.random,
        jp.scores.threshold,
    ]
    for_all = lambda p, i: [criterion(p, i) for criterion in criteria]  # noqa: E731
    assert large(for_all, params, importance) == []


@pytest.mark.parametrize(
    ("mesh", "allocation", "pattern"),
    [
        (AUTO, "global", jp.patterns.Unstructured()),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (AUTO, "layer", jp.patterns.Unstructured()),
                (EXPLICIT, "global", jp.patterns.Unstructured()),
                (EXPLICIT, "layer", jp.patterns.Unstructured()),
                (AUTO, "layer", jp.patterns.NM(2, 4)),
                (EXPLICIT, "global", jp.patterns.NM(2, 4)),
                (AUTO, "global", jp.patterns.Block(4, 8)),
                (EXPLICIT, "layer", jp.patterns.Block(4, 8)),
                (AUTO, "layer", jp.patterns.Channel()),
                (EXPLICIT, "global", jp.patterns.Channel()),
            )
        ),
    ],
    indirect=["mesh"],
    ids=str,
)
def test_masks_and_pruning(params, scores, pattern, allocation):
    def both(params, scores):
        arguments = {"allocation": allocation, "pattern": pattern}
        made = jp.masks.make(scores, 0.5, **arguments)
        return made, jp.prune(params, scores, 0.5, **arguments)

    assert large(both, params, scores) == []


def test_what_is_done_with_masks(params, scores, masks):
    def everything(params, scores, masks):
        packed = jp.masks.pack(masks)
        return (
            jp.masks.above(scores, 0.5),
            jp.masks.apply(params, masks),
            jp.masks.combine(masks, masks),
            packed,
            jp.masks.unpack(packed),
        )

    packed = unsent(everything, params, scores, masks)[3]
    assert large(jp.masks.unpack, packed) == []


def test_counting_zeros(params):
    count = lambda p: jax.tree.map(sparsity._count, p)  # noqa: E731
    assert large(count, params) == []


def test_a_step_under_masks(params, masks):
    tx = jp.keep_masks(optax.adamw(0.125), masks)
    state = unsent(tx.init, params)
    assert large(tx.update, params, state, params) == []
    for name, mask in state.masks.items():
        assert mask.sharding.is_equivalent_to(params[name].sharding, mask.ndim)


SCHEDULE = jp.schedules.cubic(0.5, begin=1, end=9, every=4)
CHOOSERS = {
    "gradual": lambda: jp.gradual(optax.adamw(0.125), SCHEDULE),
    "packed": lambda: jp.gradual(optax.adamw(0.125), SCHEDULE, packed=True),
    "by layer": lambda: jp.gradual(optax.adamw(0.125), SCHEDULE, allocation="layer"),
    "2:4": lambda: jp.gradual(optax.adamw(0.125), {1: "4:8", 5: "2:4"}),
    "grown": lambda: jp.gradual(
        optax.adamw(0.125), SCHEDULE, grow=jp.grow.random(0.25)
    ),
    "straight through": lambda: jp.straight_through(
        optax.adamw(0.125), SCHEDULE, freeze=9
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (AUTO, "gradual"),
        (EXPLICIT, "packed"),
        (AUTO, "by layer"),
        (EXPLICIT, "2:4"),
        (AUTO, "grown"),
        (EXPLICIT, "straight through"),
    ],
    indirect=["mesh"],
    ids=str,
)
def test_a_step_that_chooses_masks(params, name):
    """The step with an event and the step without are one program."""
    tx = CHOOSERS[name]()
    state = unsent(tx.init, params)
    assert large(tx.update, params, state, params) == []
    masks = jp.masks.get(state)
    for name, mask in masks.items():
        assert mask.sharding.is_equivalent_to(params[name].sharding, mask.ndim)


@pytest.mark.full
def test_every_choice_of_masks_is_typed_as_an_explicit_mesh_wants_it():
    """There a sharding that does not fit is an error as soon as it is traced."""
    spec = NamedSharding(make_mesh(EXPLICIT), P("data", "model"))
    params = {"w": jax.device_put(drawn((16, 16)), spec)}
    for name, make in CHOOSERS.items():
        tx = make()

        def chosen(params, tx=tx):
            _, state = tx.update(params, tx.init(params), params)
            return jp.masks.get(state)

        mask = jax.eval_shape(chosen, params)["w"]
        assert mask.sharding.spec == P("data", "model"), name


@pytest.mark.parametrize(
    ("mesh", "storage"),
    [
        (AUTO, "float32"),
        pytest.param(AUTO, "int8", marks=pytest.mark.full),
        pytest.param(AUTO, "bfloat16", marks=pytest.mark.full),
        pytest.param(EXPLICIT, "float32", marks=pytest.mark.full),
        pytest.param(EXPLICIT, "int8", marks=pytest.mark.full),
    ],
    indirect=["mesh"],
    ids=str,
)
def test_a_step_of_the_trackers(params, storage):
    tx = trackers(storage=storage)
    state = unsent(tx.init, params)
    assert large(tx.update, params, state, params) == []
    assert large(lambda s: tuple(jp.get_importance(s)), state) == []


def test_zeros_and_placed_arrays_cost_nothing_and_are_never_whole(mesh):
    """The comparison that ties them to the leaf is dropped after they are placed."""
    spec = NamedSharding(mesh, P("data", "model"))
    bad = np.array([[np.nan, np.inf], [-np.inf, -0.0]] * 4, np.float32)
    random = lambda leaf: jax.random.uniform(jax.random.key(0), leaf.shape)  # noqa: E731
    expected = np.asarray(jax.jit(random)(bad))
    for leaf in (bad, bad.astype(jnp.bfloat16), bad > 0):
        leaf = jax.device_put(leaf, spec)
        zeros = compiled(lambda leaf: placement.zeros_like(leaf, np.float32), leaf)
        found = zeros(leaf)
        assert found.sharding.is_equivalent_to(spec, 2)
        np.testing.assert_array_equal(found, np.zeros((8, 2), np.float32))
        assert not np.signbit(found).any()
        text = zeros.as_text()
        assert "f32[8,2]" not in text.split("ENTRY")[1]
        # Of bfloat16 and bool some versions keep it: a local read of the leaf.
        assert leaf.dtype != np.float32 or "compare(" not in text

        placed = compiled(lambda leaf: placement.placed(random(leaf), leaf), leaf)
        assert placed(leaf).sharding.is_equivalent_to(spec, 2)
        assert same_bits(np.asarray(placed(leaf)), expected)
        assert "[8,2]" not in placed.as_text().split("ENTRY")[1]


CUT = [
    ((252, 64), P("data"), jp.patterns.NM(2, 4)),  # 63 rows a device
    ((252, 64), P("data"), jp.patterns.Block(4, 4)),
    ((4, 252, 64), P(None, "data"), jp.patterns.NM(2, 4)),
    ((256, 48), P("data", "model"), jp.patterns.Block(4, 5)),
]


@pytest.mark.full
@pytest.mark.parametrize(("shape", "spec", "pattern"), CUT)
def test_where_a_device_ends_inside_a_tile_shards_change_axes(shape, spec, pattern):
    """No device ever holds more than its share, though all of it is sent."""
    mesh = make_mesh(AxisType.Explicit)
    values = drawn(shape)
    held = {"w": jax.device_put(values, NamedSharding(mesh, spec))}
    share = held["w"].addressable_shards[0].data.nbytes
    half = 0.5 if pattern.sparsity is None else None
    make = lambda s: jp.masks.make(s, half, pattern=pattern)  # noqa: E731
    program = compiled(make, held)
    moved = sent(program)
    assert {name for name, count in moved if count >= share // 8} == {"all-to-all"}
    assert max(count for _, count in moved) <= share
    one = make({"w": jnp.asarray(values)})["w"]
    for masks in (make(held), program(held)):
        assert masks["w"].sharding.is_equivalent_to(held["w"].sharding, len(shape))
        np.testing.assert_array_equal(masks["w"], one)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_where_no_axis_can_take_the_shards_the_masks_are_right_nonetheless(kind):
    """The exception: that axis is gathered, by us or on Auto meshes by the compiler."""
    values = drawn((252, 66))
    spec = NamedSharding(make_mesh(kind), P("data"))
    pattern = jp.patterns.Block(5, 4)
    make = lambda s: jp.masks.make(s, 0.5, pattern=pattern)  # noqa: E731
    held = {"w": jax.device_put(values, spec)}
    program = compiled(make, held)
    assert "all-gather" in {name for name, _ in sent(program)}
    one = make({"w": jnp.asarray(values)})["w"]
    for masks in (make(held), program(held)):
        assert masks["w"].sharding.is_equivalent_to(spec, 2)
        np.testing.assert_array_equal(masks["w"], one)
