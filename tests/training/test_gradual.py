"""gradual: the schedule's zeros after every step, and the bits of a loop by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.compilations import compiled
from tests.support.trajectories import find, gradients, record, same_bits

SCHEDULE = jp.schedules.cubic(0.8, begin=3, end=16, every=5)
STEPS = 20
PRUNED = ("first", "second")


def model(dtype=jnp.float32):
    """Two matrices of 720 and 360 weights, a bias and an embedding."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    return {
        "first": {"kernel": draw(24, 30)},
        "second": {"kernel": draw(30, 12), "bias": draw(12)},
        "embedding": draw(6, 4),
    }


def zeros(weights, layer):
    """Zeros of a recorded kernel after each step."""
    kernel = np.asarray(weights[layer]["kernel"]).astype(np.float32)
    assert not np.signbit(kernel[kernel == 0]).any()
    return (kernel == 0).sum((1, 2)).tolist()


def due(schedule, count, steps=STEPS):
    """How many of so many are zero after each step, by the schedule's own numbers."""
    table, found, now = schedule.table(), [], 0.0
    for step in range(steps):
        now = table.get(step, now)
        found.append(round(now * count))
    return found


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [
        (jnp.float32, False),
        pytest.param(jnp.bfloat16, True, marks=pytest.mark.full),
    ],
)
def test_zeros_are_exactly_the_schedules_after_every_step(dtype, packed):
    params = model(dtype)
    tx = jp.gradual(optax.adamw(0.01), SCHEDULE, packed=packed)
    run = record(tx, params, gradients(params, STEPS))
    total = np.sum([zeros(run.weights, layer) for layer in PRUNED], 0)
    assert total.tolist() == due(SCHEDULE, 720 + 360)
    for other in (run.weights["second"]["bias"], run.weights["embedding"]):
        assert np.asarray(other).all()
    masks = jp.masks.get(run.state)
    for layer in PRUNED:
        held, kernel = (np.asarray(x[layer]["kernel"]) for x in (masks, run.params))
        np.testing.assert_array_equal(held, kernel != 0)


@pytest.mark.full
def test_each_layer_has_the_zeros_of_masks_make():
    params = model()
    tx = jp.gradual(optax.adamw(0.01), SCHEDULE, allocation="erk")
    run = record(tx, params, gradients(params, STEPS))
    scores = jp.scores.magnitude(params)
    made = {
        step: jax.device_get(jp.masks.make(scores, share, allocation="erk"))
        for step, share in SCHEDULE.table().items()
    }
    for layer in PRUNED:
        expected, now = [], 0
        for step in range(STEPS):
            if step in made:
                now = int((~made[step][layer]["kernel"]).sum())
            expected.append(now)
        assert zeros(run.weights, layer) == expected


@pytest.mark.full
@pytest.mark.parametrize(
    ("pattern", "units"),
    [
        ("channel", (30, 12)),
        pytest.param("4x3", (60, 32), marks=pytest.mark.full),
    ],
)
def test_blocks_and_channels_are_counted_in_units(pattern, units):
    params = model()
    tx = jp.gradual(optax.adamw(0.01), SCHEDULE, pattern=pattern, allocation="layer")
    run = record(tx, params, gradients(params, STEPS))
    for layer, count in zip(PRUNED, units, strict=True):
        held = np.asarray(jp.masks.get(run.state)[layer]["kernel"])
        rows, columns = (len(held), 1) if pattern == "channel" else (4, 3)
        blocks = [
            held[i : i + rows, j : j + columns]
            for i in range(0, held.shape[0], rows)
            for j in range(0, held.shape[1], columns)
        ]
        assert len(blocks) == count
        assert all(block.all() or not block.any() for block in blocks)
        assert sum(not block.any() for block in blocks) == round(0.8 * count)
        if pattern == "channel":
            expected = [rows * channels for channels in due(SCHEDULE, count)]
            assert zeros(run.weights, layer) == expected
    assert not np.asarray(run.params["first"]["kernel"])[
        ~np.asarray(jp.masks.get(run.state)["first"]["kernel"])
    ].any()


@pytest.mark.full
def test_n_of_m_tightens_from_dense_to_4_of_8_to_2_of_4():
    params = model()
    tx = jp.gradual(
        optax.adamw(0.01),
        {4: "4:8", 9: "2:4"},
        prunable=lambda name, leaf: name == "first/kernel",
    )
    run = record(tx, params, gradients(params, 14))
    kernel = np.asarray(run.weights["first"]["kernel"])
    assert kernel[3].all()
    # 24 inputs are 3 groups of 8, or 6 of 4; the input axis is the first.
    for step, groups, kept in ((4, 8, 4), (8, 8, 4), (13, 4, 2)):
        counts = (kernel[step].reshape(-1, groups, 30) != 0).sum(1)
        np.testing.assert_array_equal(counts, kept)
    # Only where a group of four had fewer than two left may a weight come back.
    left = (kernel[8].reshape(6, 4, 30) != 0).sum(1)
    came = ((kernel[13] != 0) & (kernel[8] == 0)).reshape(6, 4, 30).sum(1)
    np.testing.assert_array_equal(came, np.maximum(2 - left, 0))


def by_hand(tx, params, grads, masks_at):
    """A loop that calls masks.make and masks.replace before the updates with events."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    count = 0
    for n in range(STEPS):
        if (masks := masks_at(n, params, state)) is not None:
            state = jp.masks.replace(state, masks)
        with compiled() as programs:
            gradient = jax.tree.map(lambda g, n=n: g[n], grads)
            params, state = step(params, state, gradient)
        count += len(programs)
    assert count == 1, "one program serves every event"
    return params, state


@pytest.mark.full
@pytest.mark.parametrize(
    "criterion",
    [
        jp.scores.preconditioned_magnitude,
        jp.scores.magnitude,
        jp.scores.averaged_weight,
    ],
)
def test_is_bit_for_bit_the_loop_by_hand_in_one_program(criterion):
    params = model()
    grads = jax.device_get(gradients(params, STEPS))
    inner = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.01), jp.track_importance()
    )
    everything = jp.masks.make(jp.scores.magnitude(params), 0.0)

    def masks_at(n, params, state):
        if n not in SCHEDULE.table():
            return None
        scores = criterion(params, state)
        return jp.masks.make(scores, SCHEDULE.table()[n], allocation="global")

    hand, state = by_hand(jp.keep_masks(inner, everything), params, grads, masks_at)
    tx = jp.gradual(inner, SCHEDULE, criterion=criterion)
    own, inside = by_hand(tx, params, grads, lambda *_: None)
    assert same_bits(own, hand)
    assert same_bits(inside.inner, state.inner)
    assert same_bits(jp.masks.get(inside), jp.masks.get(state))
    assert int(inside.step) == STEPS


def test_what_is_pruned_stays_pruned_where_scores_tie_and_enters_no_moment():
    params = {"w": jnp.ones((8, 8))}
    criterion = lambda p, importance=None: jax.tree.map(jnp.zeros_like, p)  # noqa: E731
    first = np.arange(64).reshape(8, 8) >= 32  # masks.make would keep the others
    tx = jp.gradual(
        optax.adam(0.1), jp.schedules.constant(0.5, 0, 4, 2), criterion=criterion
    )
    update, begun = jax.jit(tx.update), tx.init(params)
    for state, mask in (
        (jp.masks.replace(begun, {"w": jnp.asarray(first)}), first),
        (begun, ~first),
    ):
        for _ in range(5):
            _, state = update(params, state, params)
        np.testing.assert_array_equal(jp.masks.get(state)["w"], mask)
        for name in ("mu", "nu"):
            (moment,) = find(state, name)
            np.testing.assert_array_equal(np.asarray(moment["w"]) != 0, mask)


@pytest.mark.full
@pytest.mark.parametrize(
    ("grow", "allocation"),
    [
        (jp.grow.gradient(0.4), "global"),
        pytest.param(jp.grow.random(0.4), "layer", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_growth_exchanges_weights_and_keeps_the_count(grow, allocation):
    """SET and RigL: as many as the schedule says, at every event."""
    params = model()
    schedule = jp.schedules.constant(0.75, begin=1, end=16, every=5)
    tx = jp.gradual(
        optax.adamw(0.01),
        schedule,
        criterion=jp.scores.magnitude,
        grow=grow,
        allocation=allocation,
    )
    run = record(tx, params, gradients(params, STEPS))
    kernel = np.asarray(run.weights["first"]["kernel"])
    second = np.asarray(run.weights["second"]["kernel"])
    # A grown weight is zero until its first step, which is the event's own.
    counts = np.array([(kernel == 0).sum((1, 2)), (second == 0).sum((1, 2))])
    if allocation == "layer":
        assert counts.tolist() == [due(schedule, 720), due(schedule, 360)]
    assert counts.sum(0).tolist() == due(schedule, 1080)
    dead = (kernel[2] == 0) & (kernel[6] != 0)
    assert dead.any(), "nothing grew"
    # Cosine: at the last event, step 16, the part has fallen to nothing.
    np.testing.assert_array_equal(kernel[15] == 0, kernel[19] == 0)


@pytest.mark.full
def test_what_grows_by_gradient_is_what_rigl_names():
    """The cases with which JaxPruner tests RigL, through the whole transformation."""
    weights = np.array([[-9, 1, 4, -1, 5, 8, -2, 3]], np.float32)
    before = np.array([[0, 1, 0, 1, 0, 1, 1, 0]], bool)
    expected = {
        0.0: [0, 1, 0, 1, 0, 1, 1, 0],
        0.25: [1, 1, 0, 1, 0, 1, 0, 0],
        0.5: [1, 1, 0, 0, 1, 1, 0, 0],
        0.75: [1, 0, 1, 0, 1, 1, 0, 0],
        1.0: [1, 0, 1, 0, 1, 1, 0, 0],
    }

    class Parts(jp.grow.gradient):
        """Each part at an event of its own: one program serves all."""

        def part(self, step, first, last):
            part = [0.0, *expected][step]
            return jp.grow.gradient(part, decay="constant").part(step, first, last)

    tx = jp.gradual(
        optax.sgd(0.1),
        jp.schedules.constant(0.5, begin=0, end=len(expected), every=1),
        criterion=lambda p, importance=None: {"w": jnp.asarray(weights)},
        grow=Parts(),
    )
    params, update = {"w": jnp.asarray(weights * before)}, jax.jit(tx.update)
    start = jp.masks.replace(tx.init(params), {"w": jnp.asarray(before)})
    for step, after in enumerate(expected.values(), 1):
        state = start._replace(step=jnp.asarray(step, jnp.int32))
        _, state = update({"w": jnp.asarray(weights)}, state, params)
        np.testing.assert_array_equal(state.masks["w"][0], np.array(after, bool))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda tx: jp.gradual(tx, 0.5), TypeError, "schedule must be one of"),
        (lambda tx: jp.gradual(tx, {}), ValueError, "must have an event"),
        (lambda tx: jp.gradual(tx, {3: 1.5}), ValueError, "got 1.5 at step 3"),
        (lambda tx: jp.gradual(tx, SCHEDULE, pattern="2:4"), ValueError, "at step 3"),
        (lambda tx: jp.gradual(tx, {3: "channel"}), ValueError, "leaves it free"),
        (lambda tx: jp.gradual(tx, SCHEDULE, pattern="oval"), ValueError, "'oval'"),
        (lambda tx: jp.gradual(tx, SCHEDULE, allocation="no"), ValueError, "'no'"),
        (
            lambda tx: jp.gradual(tx, SCHEDULE, allocation={"*": 0.5}),
            ValueError,
            "share out the schedule's",
        ),
        (
            lambda tx: jp.gradual(tx, SCHEDULE, allocation="owl").init(model()),
            ValueError,
            "reads the inputs",
        ),
        (
            lambda tx: jp.gradual(tx, {3: "2:4"}, grow=jp.grow.random()),
            ValueError,
            "units are ranked by one cut",
        ),
        (lambda tx: jp.grow.random(1.5), ValueError, "got 1.5"),
        (lambda tx: jp.grow.gradient(decay="linear"), ValueError, "'linear'"),
        (
            lambda tx: jp.gradual(tx, jp.schedules.once(0, 0.5)).init(model()),
            ValueError,
            "first event is at step 0",
        ),
        (
            lambda tx: jp.gradual(optax.sgd(0.1), SCHEDULE).init(model()),
            ValueError,
            "inside the optimizer that is wrapped",
        ),
        (
            lambda tx: jp.gradual(
                tx, SCHEDULE, criterion=jp.scores.averaged_weight
            ).init(model()),
            ValueError,
            "inside the optimizer that is wrapped",
        ),
        (
            lambda tx: jp.gradual(tx, SCHEDULE).init({"bias": jnp.ones(3)}),
            ValueError,
            "some leaf must be prunable",
        ),
        (
            lambda tx: jp.gradual(tx, {3: "2:4", 7: 0.75}, pattern="4x4"),
            ValueError,
            "prune other weights together",
        ),
        (
            lambda tx: jp.gradual(tx, SCHEDULE, allocation="matrix"),
            ValueError,
            "of which a schedule has no table",
        ),
        (
            lambda tx: jp.gradual(tx, {3: 0.5, 7: 0.2}),
            ValueError,
            "falls from 0.5 at step 3 to 0.2 at step 7; give grow=",
        ),
        (
            lambda tx: jp.gradual(tx, {3: 0.75, 7: "2:4"}),
            ValueError,
            "falls from 0.75 at step 3 to 0.5 at step 7",
        ),
        (
            lambda tx: jp.gradual(
                tx, SCHEDULE, prunable=jp.tree.excluding("no/such/*")
            ).init(model()),
            ValueError,
            "'no/such/.'",
        ),
        (
            lambda tx: jp.gradual(
                tx,
                SCHEDULE,
                criterion=functools.partial(
                    jp.scores.magnitude, prunable=lambda name, leaf: "bias" in name
                ),
            ).init(model()),
            ValueError,
            "it scores none; give it no prunable rule",
        ),
        (
            lambda tx: jp.gradual(tx, {3: "7:9"}).init(model()),
            ValueError,
            "divisible by 9",
        ),
        (
            lambda tx: jp.gradual(tx, SCHEDULE).update(
                model(), jp.gradual(tx, SCHEDULE).init(model())
            ),
            ValueError,
            "needs the parameters",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make, error, says):
    with pytest.raises(error, match=says) as caught:
        make(optax.adamw(0.01))
    assert not str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
