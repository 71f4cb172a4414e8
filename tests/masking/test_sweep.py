"""A sweep evaluates what pruning by hand evaluates; its figures show its numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

PARAMS = {
    "up": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32),
    "down": jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32),
}
SCORES = {
    "magnitude": jp.scores.magnitude(PARAMS),
    "smallest": {name: -jnp.abs(leaf) + 9 for name, leaf in PARAMS.items()},
}
SHARES = (0.25, 0.5)


def total(params):
    return sum(float(jnp.abs(leaf).sum()) for leaf in params.values())


def doubled(params, masks):
    assert all((np.asarray(params[k]) == 0).sum() == (~masks[k]).sum() for k in masks)
    return {name: 2 * leaf for name, leaf in params.items()}


def test_each_cell_is_what_sorting_all_weights_leaves():
    swept = jp.sweep(PARAMS, SCORES, total, sparsities=SHARES, retrain=doubled)
    flat = np.sort(np.abs(np.concatenate([np.ravel(x) for x in PARAMS.values()])))
    assert swept.dense == pytest.approx(flat.sum(), rel=1e-6)
    removed = [int(share * flat.size) for share in SHARES]
    expected = [flat[n:].sum() for n in removed]
    expected += [flat[: flat.size - n].sum() for n in removed]
    assert [cell.value for cell in swept.cells] == pytest.approx(expected, rel=1e-6)
    for cell in swept.cells:
        assert cell.retrained == pytest.approx(2 * cell.value, rel=1e-6)
        assert cell.removed == cell.sparsity
    names = [cell.criterion for cell in swept.cells]
    assert names == ["magnitude"] * 2 + ["smallest"] * 2


def test_allocation_and_pattern_are_those_of_prune():
    magnitude = {"magnitude": SCORES["magnitude"]}
    (cell,) = jp.sweep(
        PARAMS, magnitude, total, sparsities=[0.5], allocation="layer", pattern="2:4"
    ).cells
    by_hand = jp.prune(PARAMS, SCORES["magnitude"], 0.5, pattern="2:4")
    assert cell.value == pytest.approx(total(by_hand), rel=1e-6)


def test_allocations_are_compared_each_as_prune_takes_it():
    magnitude = {"magnitude": SCORES["magnitude"]}
    rules = ("layer", "global")
    swept = jp.sweep(PARAMS, magnitude, total, sparsities=[0.5], allocation=rules)
    by_hand = [
        total(jp.prune(PARAMS, SCORES["magnitude"], 0.5, allocation=rule))
        for rule in rules
    ]
    assert [cell.value for cell in swept.cells] == pytest.approx(by_hand, rel=1e-6)
    assert by_hand[0] != by_hand[1]
    rows = [line.split()[:2] for line in str(swept).splitlines()[2:]]
    assert rows == [["magnitude", "layer"], ["magnitude", "global"]]
    labels = {line.get_label() for line in jp.plot.sparsity_curve(swept).lines}
    assert labels == {"dense", "magnitude, layer", "magnitude, global"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scores": SCORES["magnitude"]["up"]}, "sweep takes scores by the name"),
        ({"scores": {}}, "sweep takes scores by the name"),
        ({"sparsities": ()}, "sweep needs at least one sparsity, got none"),
        ({"sparsities": (1.0,)}, "sparsity"),
        ({"allocation": ()}, "sweep needs at least one allocation, got none"),
        ({"allocation": ("erk", "erk")}, "allocations of different text"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments, sentence):
    arguments = {"scores": SCORES, **arguments}
    with pytest.raises((TypeError, ValueError), match=sentence):
        jp.sweep(PARAMS, arguments.pop("scores"), total, **arguments)


def test_a_curve_has_the_cells_of_each_criterion():
    swept = jp.sweep(PARAMS, SCORES, total, sparsities=SHARES, retrain=doubled)
    axes = jp.plot.sparsity_curve(swept)
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {
        "dense", "magnitude, retrained", "magnitude, pruned",
        "smallest, retrained", "smallest, pruned",
    }  # fmt: skip
    for cell in swept.cells:
        x, y = lines[f"{cell.criterion}, pruned"].get_data()
        assert y[list(x).index(100 * cell.removed)] == cell.value
    again = jp.plot.sparsity_curve(swept, axes=axes)
    assert again is axes


def test_bars_cells_and_pixels_are_what_is_counted():
    masks = jp.masks.make(SCORES["magnitude"], 0.5)
    others = jp.masks.make(SCORES["smallest"], 0.5)
    bars = jp.plot.by_layer(masks).patches
    counts = jp.sparsity(masks).by_leaf.values()
    assert [bar.get_width() for bar in bars] == [100 * a / b for a, b in counts]
    pixels = np.asarray(jp.plot.masks(masks["up"]).images[0].get_array())
    np.testing.assert_array_equal(pixels, masks["up"])
    shares = jp.plot.overlap({"a": masks, "b": others}).images[0].get_array()
    both = sum(int((masks[k] & others[k]).sum()) for k in masks)
    either = sum(int((masks[k] | others[k]).sum()) for k in masks)
    np.testing.assert_allclose(shares, [[1, both / either], [both / either, 1]])


def test_what_is_no_mask_is_refused():
    with pytest.raises(ValueError, match="must have two axes or more"):
        jp.plot.masks(jnp.ones(3))
    with pytest.raises(TypeError, match="overlap draws two masks or more by name"):
        jp.plot.overlap({"a": SCORES["magnitude"]})


def test_the_axes_of_a_pattern_are_given_too():
    params = {"w": jnp.arange(1.0, 33.0).reshape(4, 8) % 7 + 1}
    scores = {"magnitude": jp.scores.magnitude(params)}
    axes = jp.Axes(inputs=(1,), outputs=(0,))
    kept = jp.masks.make(scores["magnitude"], pattern="2:4", axes=axes)
    total = []
    jp.sweep(
        params,
        scores,
        lambda p: total.append(p["w"] != 0) or 0.0,
        sparsities=[0.5],
        pattern="2:4",
        axes=axes,
    )
    assert (total[-1] == kept["w"]).all()
