"""The cases with which JaxPruner tests itself, asked of this package.

Inputs and expected values are those of its test files (google-research/jaxpruner at
f133ee5). Three more stand beside what they test: the cubic's half way in
`test_schedules.py`, RigL's exchanges in `test_gradual.py`, the moments of what is grown
in `test_restarts.py`. Where we differ, a test says so and why. Without a counterpart
here: pooling a block by its maximum, and the growth of a mask that is drawn rather than
ranked.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.full

# mask_calculator_test.py
SCORES = [
    [
        [0.69, 0.37, 0.96, 0.81],
        [0.79, 0.55, 0.88, 0.53],
        [0.66, 0.88, 0.4, 0.83],
        [0.13, 0.8, 0.91, 0.96],
    ],
    [
        [0.34, 0.17, 0.07, 0.74],
        [0.13, 0.13, 0.83, 0.76],
        [0.13, 0.92, 0.25, 0.75],
        [0.37, 0.42, 0.65, 0.46],
    ],
]
UNEVEN = [1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2.0, 1, 1]
LAST = jp.Axes(inputs=(-1,), outputs=(-2,))  # groups of n:m along the last axis


def made(scores, sparsity=None, **options):
    """The mask of one leaf."""
    scores = {"w": jnp.asarray(np.array(scores, np.float32))}
    mask = jp.masks.make(scores, sparsity, **options)["w"]
    return np.asarray(mask).astype(int).tolist()


@pytest.mark.parametrize(
    ("scores", "sparsity", "expected"),
    [
        (
            SCORES,
            0.8,
            [
                [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]],
                [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
            ],
        ),
        ([1] * 8, 0.5, [1, 1, 1, 1, 0, 0, 0, 0]),
        (UNEVEN, 0.5, [1, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        (
            [UNEVEN, UNEVEN],
            0.5,
            [[1, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]],
        ),
    ],
)
def test_unstructured_masks(scores, sparsity, expected):
    assert made(scores, sparsity) == expected


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (
            LAST,
            [
                [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
                [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]],
            ],
        ),
        (
            None,  # along the input of Flax's [..., in, out], their axis=1
            [
                [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]],
                [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
            ],
        ),
    ],
)
def test_2_of_4_along_either_axis(axes, expected):
    assert made(SCORES, pattern="2:4", axes=axes) == expected


def test_2_of_4_keeps_the_first_of_ties_where_theirs_keeps_the_last():
    """One rule for ties in every pattern; theirs has [0, 0, 1, 1] here."""
    scores = [[1] * 8]
    assert made(scores, pattern="2:4", axes=LAST) == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_impossible_n_of_m_are_refused():
    with pytest.raises(ValueError, match="4"):
        jp.patterns.NM(4, 2)
    for shape in ((2, 6, 4), (2, 5, 3)):
        with pytest.raises(ValueError, match="divisible by 4"):
            jp.masks.make({"w": np.ones(shape, np.float32)}, pattern="2:4")


def test_2_of_4_at_sparsity_zero_is_refused_where_theirs_keeps_all():
    """A pattern that is quietly not applied is an error here."""
    with pytest.raises(ValueError, match=r"removes exactly 0.5 .*sparsity=0"):
        jp.masks.make({"w": np.ones((4, 4), np.float32)}, 0.0, pattern="2:4")
    assert made(SCORES, 0.0) == np.ones((2, 4, 4), int).tolist()


@pytest.mark.parametrize(
    ("scores", "axes", "expected"),
    [
        (SCORES, jp.Axes((0, 2), (1,)), [[[0] * 4] * 2 + [[1] * 4] * 2] * 2),
        (SCORES, jp.Axes((0, 1), (2,)), [[[0, 0, 1, 1]] * 4] * 2),
        ([UNEVEN, UNEVEN], None, [[1, 0, 0, 0, 1, 1, 1, 1, 0, 0]] * 2),
    ],
)
def test_channels(scores, axes, expected):
    assert made(scores, 0.5, pattern="channel", axes=axes) == expected


@pytest.mark.parametrize(
    ("scores", "pattern", "expected"),
    [
        (
            np.reshape(SCORES, (4, 8)),
            "2x3",
            [[1] * 8] * 2 + [[0, 0, 0, 1, 1, 1, 1, 1]] * 2,
        ),
        (
            [[0.69, 0.37, 0.96, 0.81, 0.79, 0.55, 0.88, 0.53]],
            "1x3",
            [[0, 0, 0, 1, 1, 1, 1, 1]],
        ),
    ],
)
def test_blocks_by_their_mean_with_smaller_ones_at_the_edge(scores, pattern, expected):
    assert made(scores, 0.2, pattern=pattern) == expected


def test_blocks_of_a_stack_lie_in_its_matrices():
    """Theirs pools the first two axes of three, across the matrices of a stack."""
    # The lowest mean, of .34, .17, .13 and .13, is in the second matrix.
    expected = [[[1] * 4] * 4, [[0, 0, 1, 1]] * 2 + [[1] * 4] * 2]
    assert made(SCORES, 1 / 8, pattern="2x2") == expected


# sparsity_distributions_test.py


def sparsities(shapes, sparsity, **options):
    """The share of each leaf that is pruned."""
    scores = {
        name: jnp.asarray(np.zeros(shape, np.float32)) for name, shape in shapes.items()
    }
    masks = jax.jit(lambda own: jp.masks.make(own, sparsity, **options))(scores)
    return {name: 1 - float(np.mean(mask)) for name, mask in masks.items()}


def test_uniform_leaves_vectors_alone_and_takes_shares_by_name():
    params = {
        "a": jnp.zeros((2, 4)),
        "b": {"c": jnp.zeros((3, 6, 7)), "d": jnp.ones(4)},
    }
    masks = jax.jit(
        lambda own: jp.masks.make(jp.scores.magnitude(own), 0.5, allocation="layer")
    )(params)
    assert [np.sum(masks["a"]), np.sum(masks["b"]["c"])] == [4, 63]
    assert isinstance(masks["b"]["d"], optax.MaskedNode)
    shapes = {"a": (2, 4), "c": (3, 6, 7), "d": (10, 4)}
    own = sparsities(shapes, {"d": 0.1, "*": 0.5})
    assert own == pytest.approx({"a": 0.5, "c": 0.5, "d": 0.1})


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"a": (20, 40)}, {"a": 0.5}),
        (
            {"a": (20, 40), "b": (30, 60), "c": (2, 40, 60)},
            {"a": 0.21, "b": 0.47, "c": 0.56},
        ),
    ],
)
def test_erk_of_matrices(shapes, expected):
    """Their sides times ten, which changes no share and leaves less to rounding.

    Theirs adds up all axes of a kernel of three or more, (3 + 6 + 7) / (3 6 7), or with
    include_kernel=False the last two. Here a leaf counts as the matrices that it is,
    so a stack has the numbers of the latter.
    """
    found = sparsities(shapes, 0.5, allocation="erk")
    assert found == pytest.approx(expected, abs=5e-3)


def test_what_no_rule_can_share_out_is_refused():
    scores = {"a": np.zeros((2, 4), np.float32), "d": np.zeros((7, 4), np.float32)}
    with pytest.raises(ValueError, match=r"\[0, 1\).*got -1"):
        jp.masks.make(scores, -1.0, allocation="erk")
    # Theirs keeps shares by name out of the balance; here it is one or the other.
    with pytest.raises(ValueError, match="needs one sparsity to share out"):
        jp.masks.make(scores, {"d": 0.1}, allocation="erk")


# sparsity_schedules_test.py and base_updater_test.py


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def events(schedule, sparsity_at):
    """At which of 24 steps masks change, and the sparsity after each step."""
    params = {"w": drawn(16, 16)}
    tx = jp.gradual(optax.sgd(0.0), schedule, criterion=jp.scores.magnitude)

    def step(state, _):
        _, after = tx.update(params, state, params)
        kept = jnp.sum(jp.masks.get(after)["w"])
        return after, (jnp.any(after.masks["w"] != state.masks["w"]), kept)

    run = jax.jit(lambda state: jax.lax.scan(step, state, None, length=24)[1])
    changed, kept = run(tx.init(params))
    assert (256 - np.asarray(kept)).tolist() == [sparsity_at(n) for n in range(24)]
    return np.flatnonzero(changed).tolist()


def test_one_shot_and_periodic_updates():
    once = events(jp.schedules.once(20, 0.5), lambda n: 128 * (n >= 20))
    assert once == [20]
    periodic = jp.schedules.constant(0.5, 0, 20, 5)
    assert events(periodic, lambda n: 128) == [0]  # the rest finds the same masks
    assert 10 in periodic.table()
    assert 9 not in periodic.table()


def test_a_polynomial_whose_end_is_off_its_grid_ends_at_its_target():
    """Every 2 from 4 to 9: theirs updates at 4, 6, 8 and never gets to 0.8."""
    table = jp.schedules.cubic(0.8, begin=4, end=9, every=2).table()
    assert list(table) == [4, 6, 8, 9]
    assert table[9] == 0.8
    now = lambda n: round(256 * max((s for t, s in table.items() if t <= n), default=0))  # noqa: E731
    assert events(jp.schedules.cubic(0.8, 4, 9, 2), now) == [6, 8, 9]


def test_extra_arguments_reach_the_optimizer_where_theirs_drops_them():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = jp.gradual(inner, {1: 0.5}, criterion=jp.scores.magnitude)
    params = {"w": jnp.ones((2, 2))}
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, foo="bar"), params)
    assert seen == [{"foo": "bar"}]


# pruners_test.py, global_pruners_test.py and ste_test.py


def everywhere(name, leaf):
    return True


def test_scores_of_the_pruners():
    params = {"w": jnp.array([0.1, 0.9, -0.2, 0.5])}
    magnitude = jp.scores.magnitude(params, prunable=everywhere)
    np.testing.assert_allclose(magnitude["w"], [0.1, 0.9, 0.2, 0.5], rtol=1e-6)
    params = {"w": jnp.array([0.1, 0.9, 0.2, 0.5])}
    tracker = jp.track_gradients(average=("taylor",))
    grads = {"w": jnp.array([5, 1, 3, 0.5])}
    _, state = jax.jit(tracker.update)(grads, tracker.init(params), params)
    found = jp.scores.taylor(params, state, prunable=everywhere)["w"]
    np.testing.assert_allclose(found, [0.5, 0.9, 0.6, 0.25], rtol=1e-6)


def test_random_scores_differ_by_seed_and_prune_exactly_half():
    params = {"w": drawn(10, 10)}
    one, two = (jp.scores.random(params, seed=seed) for seed in (0, 5))
    assert not np.array_equal(one["w"], two["w"])
    assert np.sum(jp.masks.make(one, 0.5)["w"]) == 50


def test_one_ranking_of_all_leaves():
    scores = {"w": jnp.array([0.1, 0.9, -0.2, 0.5]), "w2": jnp.array([0.7, 0.8])}
    masks = jp.masks.make(scores, 0.5, allocation="global")
    assert masks["w"].tolist() == [False, True, False, False]
    assert masks["w2"].tolist() == [True, True]


def test_half_of_a_matrix_by_magnitude():
    weight = [
        [0.11, -1.08, -1.6, 0.37],
        [-0.3, 1.03, 0.02, -0.78],
        [-0.95, 0.47, -1.3, 0.87],
        [1.96, 3.02, 0.3, -0.92],
    ]
    expected = [
        [0, -1.08, -1.6, 0],
        [0, 1.03, 0, 0],
        [-0.95, 0, -1.3, 0],
        [1.96, 3.02, 0, -0.92],
    ]
    params = {"w": jnp.array(weight)}
    pruned = jp.prune(params, jp.scores.magnitude(params), 0.5)["w"]
    np.testing.assert_array_equal(pruned, np.float32(expected))


def test_straight_through_is_half_zero_while_the_dense_weights_stay_dense():
    """Theirs needs a call before each forward pass; here the parameters are pruned.

    By magnitude, as theirs does too: tests/training/test_straight_through.py.
    """
    params = {"w": drawn(10, 10)}
    once = jp.schedules.once(0, 0.5)
    tx = jp.straight_through(
        optax.adam(1e-4), once, freeze=None, criterion=jp.scores.random
    )
    gradient = jax.grad(lambda p: -jnp.sum(jnp.abs(p["w"])))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        dense = params["w"] + state.parked["w"]
        return (params, state), (jnp.sum(params["w"] == 0), jnp.sum(dense == 0))

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=10)[1])
    pruned, lost = run((params, tx.init(params)))
    assert pruned.tolist() == [50] * 10
    assert lost.tolist() == [0] * 10
