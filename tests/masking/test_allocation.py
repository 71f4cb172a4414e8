"""One sparsity, many matrices: shares against the papers' formulas in NumPy."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.masking import counts
from tests.support.small_models import (
    chain,
    correlated,
    draw,
    kernels_of,
    prune,
    run_chain,
)
from tests.support.small_models import quick_compilation as quick_compilation

WIDTHS = [6, 12, 24, 4]
PARAMS = chain(WIDTHS)
BATCHES = [correlated(i, 20, 6) / 3 for i in range(2)]
SIZES = np.array([72, 288, 96])


def zeros(shares, sparsity, params=PARAMS, fn=run_chain, **options):
    """What prune_trained removes of each weight, by magnitude."""
    report = prune(
        fn, params, BATCHES, "magnitude", sparsity, allocation=shares, **options
    ).report
    return np.array([row["removed"] for row in report["weights"]])


def rule(shares, sparsity, params=PARAMS, fn=run_chain):
    """The shares themselves, by the rule alone."""
    traced = jp.trace(fn, params, BATCHES[0])
    leaves = {k: jnp.asarray(v) for k, v in jp.tree.named_leaves(params).items()}
    moments = jp.calibrate(fn, params, BATCHES) if shares.needs_inputs else {}
    weights = [
        jp.allocation.Weight(
            name=p.name,
            leaf=p.leaf,
            index=p.index,
            shape=p.shape,
            view=p.view.read,
            read=lambda p=p: p.view.read(leaves[p.leaf]),
            mean_square=moments[p.name].mean_square if moments else None,
        )
        for p in traced.linear_ops
        if jp.tree.prunable(p.leaf, leaves[p.leaf])
    ]
    found = shares.sparsities(weights, sparsity)
    assert len(found) == len(weights)
    assert all(isinstance(share, Fraction) for share in found)
    return np.array([float(share) for share in found]), weights


# The same for each layer.


@pytest.mark.full
def test_uniform_takes_the_same_share_of_every_weight():
    np.testing.assert_array_equal(
        zeros(jp.allocation.Layer(), 0.37), [round(0.37 * int(n)) for n in SIZES]
    )
    assert not jp.allocation.Layer().needs_inputs


# Erdos-Renyi-Kernel.


def erk_by_hand(shapes, sparsity):
    """Kept shares: eps (in + out) / (in out), those over 1 being dense."""
    size = np.array([a * b for a, b in shapes], float)
    raw = np.array([(a + b) / (a * b) for a, b in shapes])
    dense = np.zeros(len(shapes), bool)
    while True:
        left = (1 - sparsity) * size.sum() - size[dense].sum()
        eps = left / (raw * size)[~dense].sum()
        kept = np.where(dense, 1, eps * raw)
        if (kept <= 1).all():
            return kept
        dense |= kept > 1


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_erk_is_the_formula_of_the_paper(sparsity):
    shapes = [k.shape for k in kernels_of(PARAMS)]
    kept = erk_by_hand(shapes, sparsity)
    found, _ = rule(jp.allocation.ERK(), sparsity)
    # Counts are integers; the formula's are not.
    assert np.abs(found - (1 - kept)).max() * SIZES.max() < 2.5
    assert round(float(found @ SIZES)) == round(sparsity * SIZES.sum())


def test_erk_leaves_a_small_weight_whole_where_it_would_keep_more_than_all():
    params = chain([6, 2, 40, 40])
    kept = erk_by_hand([(6, 2), (2, 40), (40, 40)], 0.5)
    assert (kept == 1).any()
    found, _ = rule(jp.allocation.ERK(), 0.5, params)
    np.testing.assert_array_equal(found[kept == 1], 0)
    sizes = np.array([12, 80, 1600])
    np.testing.assert_allclose(found @ sizes, 0.5 * sizes.sum())
    np.testing.assert_allclose(found, 1 - kept, atol=2 / 12)


# OWL.


def owl_by_hand(blocks, inputs, sparsity, spread=0.08, factor=5.0):
    """Kept shares by block from lists of its kernels and their inputs.

    The paper's code: the outliers of a block are those over M times the mean of its
    scores; min-max scaled to 2 lambda; moved so that their mean is the share to keep.
    """
    ratios = []
    for kernels, own in zip(blocks, inputs, strict=True):
        scores = np.concatenate(
            [
                (np.abs(w) * np.sqrt(np.square(x).mean(0))[:, None]).ravel()
                for w, x in zip(kernels, own, strict=True)
            ]
        )
        ratios.append((scores > factor * scores.mean()).mean() * 100)
    ratios = np.array(ratios)
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * spread * 2
    return scaled - scaled.mean() + (1 - sparsity)


def blocks_with_outliers():
    """Three blocks of two equal kernels; the later, the more weights are outliers."""
    params = {"blocks": []}
    rng = np.random.default_rng(0)
    for i in range(3):
        own = {}
        for j, name in enumerate(["a", "b"]):
            kernel = draw(10 * i + j, 6, 6) / 4
            kernel[rng.random((6, 6)) < 0.05 * i] *= 25
            own[name] = jnp.asarray(kernel)
        params["blocks"].append(own)
    return params


def run_blocks(p, x):
    for own in p["blocks"]:
        x = jnp.tanh(jnp.tanh(x @ own["a"]) @ own["b"]) * 3
    return x


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.full), {"spread": 0.2, "factor": 3.0}],
)
def test_owl_is_the_formula_of_the_papers_code(settings):
    params = blocks_with_outliers()
    x, kernels, inputs = np.concatenate(BATCHES).astype(np.float64), [], []
    for own in params["blocks"]:
        a, b = np.asarray(own["a"], np.float64), np.asarray(own["b"], np.float64)
        middle = np.tanh(x @ a)
        kernels.append((a, b))
        inputs.append((x, middle))
        x = np.tanh(middle @ b) * 3
    kept = owl_by_hand(kernels, inputs, 0.6, **settings)
    spread = settings.get("spread", 0.08)
    np.testing.assert_allclose(kept.max() - kept.min(), 2 * spread)

    found, _ = rule(jp.allocation.OWL(**settings), 0.6, params, run_blocks)
    # All are of one size, so the exact sum asks for no shift: counts are rounded only.
    np.testing.assert_allclose(found, np.repeat(1 - kept, 2), atol=1.01 / 36)
    assert round(float(found.sum() * 36)) == round(0.6 * 6 * 36)
    removed = zeros(jp.allocation.OWL(**settings), 0.6, params, run_blocks)
    np.testing.assert_allclose(removed, found * 36)


def test_owl_takes_the_layers_of_a_stack_for_blocks():
    params = blocks_with_outliers()["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *params)

    def run_stack(p, x):
        def layer(x, own):
            return jnp.tanh(jnp.tanh(x @ own["a"]) @ own["b"]) * 3, None

        return jax.lax.scan(layer, x, p["blocks"])[0]

    one, _ = rule(jp.allocation.OWL(), 0.6, {"blocks": params}, run_blocks)
    other, weights = rule(jp.allocation.OWL(), 0.6, {"blocks": stacked}, run_stack)
    assert [w.index for w in weights] == [(i,) for i in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_allclose(one, other)


def test_owl_meets_the_sparsity_of_all_where_layers_differ_in_size():
    found, _ = rule(jp.allocation.OWL(), 0.7)
    assert round(float(found @ SIZES)) == round(0.7 * SIZES.sum())
    assert found.min() >= 0
    assert found.max() <= 1


def test_owl_shares_out_beside_an_empty_weight():
    blocks = [{"a": jnp.ones((6, 6))}, {"a": jnp.ones((0, 6))}]
    weights = [
        jp.allocation.Weight(
            name=f"blocks/{i}/a",
            leaf=f"blocks/{i}/a",
            index=(),
            shape=(1, *own["a"].shape),
            view=lambda leaf: leaf[None],
            read=lambda own=own: own["a"][None],
            mean_square=jnp.ones((1, own["a"].shape[0])),
        )
        for i, own in enumerate(blocks)
    ]
    assert jp.allocation.OWL().sparsities(weights, 0.5)[0] == 0.5


def test_owl_without_any_difference_is_uniform():
    ones = jnp.asarray(np.ones((6, 6), np.float32))
    params = {"blocks": [{"a": ones, "b": ones}] * 3}
    found, _ = rule(jp.allocation.OWL(), 0.5, params, run_blocks)
    np.testing.assert_allclose(found, 0.5)


# A global ranking.


@pytest.mark.full
@pytest.mark.parametrize("sparsity", [0.2, 0.85])
def test_ranked_shares_are_those_of_a_global_ranking(sparsity):
    square = jax.tree.map(lambda w: jnp.asarray(np.abs(np.roll(w, 1)) + 0.01), PARAMS)
    scores = jp.scores.preconditioned_magnitude(PARAMS, jp.Importance(square=square))
    masks = jp.masks.make(scores, sparsity, allocation="global")
    gone = [int((~np.asarray(masks[k]["kernel"])).sum()) for k in PARAMS]
    assert len(set(np.round(gone / SIZES, 2))) > 1
    np.testing.assert_array_equal(zeros(jp.allocation.Ranked(scores), sparsity), gone)
    assert sum(gone) == round(sparsity * SIZES.sum())


def test_ranked_shares_of_a_stacked_leaf_are_by_layer():
    stack = draw(1, 3, 6, 6) * np.array([1, 3, 10], np.float32)[:, None, None]

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    scores = jp.scores.magnitude({"w": stack})
    mask = np.asarray(jp.masks.make(scores, 0.5, allocation="global")["w"])
    removed = zeros(jp.allocation.Ranked(scores), 0.5, {"w": stack}, fn)
    np.testing.assert_array_equal(removed, (~mask).sum((1, 2)))


def test_ranked_needs_scores_of_every_weight_to_prune():
    scores = jp.scores.magnitude(PARAMS, prunable=jp.tree.excluding("layer_1/*"))
    with pytest.raises(ValueError, match="layer_1/kernel"):
        zeros(jp.allocation.Ranked(scores), 0.5)


# All of them.


@pytest.mark.parametrize("name", ["Layer", "ERK", "OWL", "Ranked"])
def test_the_total_is_exact_in_weights(name):
    make = getattr(jp.allocation, name)
    shares = make(jp.scores.magnitude(PARAMS)) if name == "Ranked" else make()
    _, weights = rule(shares, 0.5)
    for sparsity in (0.0, 1 / 3, 0.613):
        removed = counts.by_rule(sparsity, shares, weights, SIZES.tolist())
        removed = np.array(removed)
        if name == "Layer":
            expected = sum(round(sparsity * int(n)) for n in SIZES)
        else:
            expected = round(sparsity * int(SIZES.sum()))
        assert removed.sum() == expected
        assert (removed >= 0).all()
        assert (removed <= SIZES).all()
    np.testing.assert_array_equal(zeros(shares, 0.613), removed)


# The same words in masks.make, prune and prune_trained.


def pruned_counts(masks):
    return [int((~np.asarray(mask)).sum()) for mask in jax.tree.leaves(masks)]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("layer", jp.allocation.Layer()),
        ("global", jp.allocation.Global()),
        ("erk", jp.allocation.ERK()),
    ],
)
def test_a_word_and_its_value_mean_the_same_in_make_and_in_prune_trained(word, value):
    scores = jp.scores.magnitude(PARAMS)
    masks = jp.masks.make(scores, 0.6, allocation=word)
    named = jp.masks.make(scores, 0.6, allocation=value)
    trained = zeros(word, 0.6)
    assert jp.allocation.parse(word) == jp.allocation.parse(value) == value
    np.testing.assert_array_equal(pruned_counts(masks), trained)
    pruned = jp.prune(PARAMS, scores, 0.6, allocation=word)
    for one, other, kept in zip(*map(kernels_of, (masks, named, pruned)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(kept) != 0)


def test_magnitude_with_a_global_allocation_is_global_magnitude_pruning():
    pruned = prune(
        run_chain, PARAMS, BATCHES, "magnitude", 0.6, allocation="global"
    ).params
    expected = jp.prune(PARAMS, jp.scores.magnitude(PARAMS), 0.6, allocation="global")
    for a, b in zip(*map(kernels_of, (pruned, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_ranked_gives_make_the_counts_of_its_own_scores():
    others = jax.tree.map(lambda w: jnp.asarray(np.roll(w, 5)), PARAMS)
    ranked = jp.allocation.Ranked(jp.scores.magnitude(PARAMS))
    expected = jp.masks.make(ranked.scores, 0.55, allocation="global")
    masks = jp.masks.make(jp.scores.magnitude(others), 0.55, allocation=ranked)
    assert pruned_counts(masks) == pruned_counts(expected)


@pytest.mark.full
def test_ranked_works_under_jit_where_its_own_scores_have_values():
    scores = jp.scores.magnitude(PARAMS)
    ranked = jp.allocation.Ranked(scores)
    make = lambda s: jp.masks.make(s, 0.55, allocation=ranked)  # noqa: E731
    assert pruned_counts(jax.jit(make)(scores)) == pruned_counts(make(scores))
    with pytest.raises(ValueError, match="traced; make them outside of jit"):
        jax.jit(lambda s: jp.masks.make(s, 0.5, allocation=jp.allocation.Ranked(s)))(
            scores
        )


def test_shares_by_leaf_are_an_allocation_too():
    scores, rules = jp.scores.magnitude(PARAMS), {"layer_1/*": 0.5}
    masks = jp.masks.make(scores, allocation=rules)
    assert pruned_counts(masks) == [0, 144, 0]
    assert zeros(rules, None).tolist() == [0, 144, 0]
    with pytest.raises(ValueError, match="must be given once"):
        jp.masks.make(scores, 0.5, allocation=rules)


def test_owl_says_in_one_sentence_where_it_finds_inputs():
    with pytest.raises(ValueError, match=r"reads the inputs.*jp\.prune_trained"):
        jp.masks.make(jp.scores.magnitude(PARAMS), 0.5, allocation="owl")


def test_a_rule_by_shapes_names_leaves_that_are_no_matrices():
    scores = {"w": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"ERK needs leaves .*'bias' have none"):
        jp.masks.make(scores, 0.5, allocation="erk")


@pytest.mark.parametrize(
    ("allocation", "error", "words"),
    [
        ("layers", ValueError, "layer, global, erk, owl.*got 'layers'"),
        (jp.allocation.ERK, TypeError, r"such as jp\.allocation\.ERK\(\)"),
        (0.5, TypeError, "got 0.5"),
    ],
)
def test_what_is_no_allocation_is_refused_with_the_choices(allocation, error, words):
    for call in (zeros, lambda a, s: jp.masks.make(PARAMS, s, allocation=a)):
        with pytest.raises(error, match=words):
            call(allocation, 0.5)


def test_allocations_print_and_compare():
    assert jp.allocation.OWL() == jp.allocation.parse("owl")
    assert jp.allocation.OWL(spread=0.1) != jp.allocation.OWL()
    assert repr(jp.allocation.Global()) == "Global()"
    assert repr(jp.allocation.Ranked(PARAMS)) == "Ranked()"


@pytest.mark.parametrize(
    "settings",
    [
        *({"spread": x} for x in (-0.1, 1.0, float("nan"))),
        *({"factor": x} for x in (0.0, float("inf"), float("nan"))),
    ],
)
def test_numbers_that_turn_owl_round_are_refused(settings):
    with pytest.raises(ValueError, match="OWL needs 0 <= spread < 1 and a factor"):
        jp.allocation.OWL(**settings)
