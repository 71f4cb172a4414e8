"""Smaller trained functions: group after group, beside NumPy's least squares."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.arrays.lazy import LazyArray
from jaxprune.posttraining import unit_rows
from jaxprune.posttraining.solvers import units
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

PARAMS = {
    "first": {"up": draw(0, 5, 8), "bias": draw(1, 8), "down": draw(2, 8, 5)},
    "second": {"up": draw(3, 5, 8), "bias": draw(4, 8), "down": draw(5, 8, 5)},
}
BATCHES = [draw(6, 40, 5), draw(7, 40, 5)]


def hidden(own, x):
    return jnp.tanh(x @ own["up"] + own["bias"][None])


def fn(params, x):
    x = x + hidden(params["first"], x) @ params["first"]["down"]
    return x + hidden(params["second"], x) @ params["second"]["down"]


def shrink(fn, params, batches, keep=0.5, correction=0.0, **options):
    settings = {"damping", "relative"} & {*options}
    solver = jp.passes.sparsegpt(**{name: options.pop(name) for name in settings})
    passes = jp.passes.chain(solver, jp.passes.correct(correction))
    return jp.shrink(fn, params, batches, passes, keep, **options)


def cheapest(x, weight, count):
    """Greedy by least squares in float64: the units kept, and their rows at best."""
    x, weight = np.float64(x), np.float64(weight)

    def best(kept):
        new = np.linalg.lstsq(x[:, kept], x @ weight, rcond=None)[0]
        return new, np.sum(np.square(x @ weight - x[:, kept] @ new))

    kept = list(range(len(weight)))
    for _ in range(count):
        kept = min(
            ([k for k in kept if k != i] for i in kept), key=lambda k: best(k)[1]
        )
    return kept, best(kept)[0]


def made_up(x, dense, weight, share, relative):
    """The weight, and what is missing of the whole model's outputs; sizes of rows."""
    size = np.sqrt(np.mean(np.square(x), 1, keepdims=True)) if relative else 1
    missing = (dense - x) / size @ weight
    return weight + share * np.linalg.lstsq(x / size, missing, rcond=None)[0], size


@pytest.mark.full
@pytest.mark.parametrize("correction", [0, 0.5, 1])
@pytest.mark.parametrize("relative", [True, False])
def test_each_layer_is_solved_for_what_the_one_before_has_left(relative, correction):
    # Rows of very different sizes: equal errors there are not equal relative errors.
    batches = [batch * np.exp(draw(9, 40, 1)) for batch in BATCHES]
    options = {"damping": 0.0, "relative": relative, "correction": correction}
    small = shrink(fn, PARAMS, batches, 0.5, **options)
    x = dense = np.concatenate(batches)
    for name in ("first", "second"):
        own = PARAMS[name]
        inner, whole = (np.tanh(y @ own["up"] + own["bias"]) for y in (x, dense))
        down, size = made_up(inner, whole, own["down"], correction, relative)
        kept, down = cheapest(inner / size, down, 4)
        found = small.params[name]
        assert small.report["kept"][f"{name}/bias:0"] == kept
        np.testing.assert_array_equal(found["up"], own["up"][:, kept])
        np.testing.assert_array_equal(found["bias"], own["bias"][kept])
        np.testing.assert_allclose(found["down"], down, rtol=1e-3, atol=1e-3)
        x = x + inner[:, kept] @ down  # with less in it from here on
        dense = dense + whole @ own["down"]
    run = jax.jit(small.fn)
    found = np.concatenate([run(small.params, batch) for batch in batches])
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3)


def two_ways(p, x):
    h = jnp.tanh(x @ p["up"])
    return h @ p["down"] + jnp.square(h) @ p["other"]


def recurrent(p, x):
    """A state that is read by the next step and, in the end, by the head."""
    h = jnp.tanh(x[:, 0] @ p["up"])
    for step in (1, 2):
        h = jnp.tanh(x[:, step] @ p["up"] + h @ p["down"])
    return h @ p["other"]


def inputs_of_two_ways(p, x):
    h = np.tanh(x @ p["up"])
    return [h, np.square(h)]


def inputs_of_recurrent(p, x):
    first = np.tanh(x[:, 0] @ p["up"])
    second = np.tanh(x[:, 1] @ p["up"] + first @ p["down"])
    last = np.tanh(x[:, 2] @ p["up"] + second @ p["down"])
    return [np.concatenate([first, second]), last]


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "inputs_of", "x", "outputs"),
    [
        (two_ways, inputs_of_two_ways, draw(3, 60, 5), 2),
        (recurrent, inputs_of_recurrent, draw(3, 60, 3, 5), 7),
    ],
)
def test_of_units_with_several_readers_go_those_that_cost_all_least(
    model, inputs_of, x, outputs
):
    params = {"up": draw(0, 5, 7), "down": draw(1, 7, outputs), "other": draw(2, 7, 2)}
    small = shrink(model, params, [x], 5 / 7, damping=0.0)
    inputs = [np.float64(part) for part in inputs_of(params, x)]
    weights = [np.float64(params[name]) for name in ("down", "other")]

    def best(kept):
        """The rows of both readers by least squares, and their relative errors' sum."""
        pairs = [(x[:, kept], x @ w) for x, w in zip(inputs, weights, strict=True)]
        rows = [np.linalg.lstsq(*pair, rcond=None)[0] for pair in pairs]
        errors = [
            np.square(y - x @ new).sum() / np.square(y).sum()
            for (x, y), new in zip(pairs, rows, strict=True)
        ]
        return rows, sum(errors)

    # All pairs of units are tried.
    choices = [list(kept) for kept in itertools.combinations(range(7), 5)]
    kept = min(choices, key=lambda kept: best(kept)[1])
    assert [*small.report["kept"].values()] == [kept]
    rows, _ = best(kept)
    if model is recurrent:  # what it writes is gone too
        rows[0] = rows[0][:, kept]
    np.testing.assert_array_equal(small.params["up"], params["up"][:, kept])
    for name, expected in zip(("down", "other"), rows, strict=True):
        np.testing.assert_allclose(small.params[name], expected, rtol=1e-3, atol=1e-3)
    names = [row["name"] for row in small.report["weights"]]
    assert sorted(names) == ["down", "other"]


@pytest.mark.full
def test_only_positions_that_count_are_solved_for():
    def positions(batch):
        return jnp.arange(len(batch)) < 30

    found = shrink(fn, PARAMS, BATCHES, 0.5, positions=positions)
    first = shrink(fn, PARAMS, [batch[:30] for batch in BATCHES], 0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found.params,
        first.params,
    )


@pytest.mark.full
def test_channels_are_made_up_for_in_the_next_convolution():
    params = {"one": draw(0, 3, 3, 2, 6), "two": draw(1, 2, 2, 6, 3)}
    x = draw(2, 4, 8, 8, 2)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def model(p, x):
        return convolve(jnp.tanh(convolve(x, p["one"])), p["two"])

    convolved = jax.jit(convolve)

    small = shrink(model, params, [x], {"one:3": 0.5}, damping=0.0, relative=False)
    kept = small.report["kept"]["one:3"]
    inner = np.tanh(convolved(x, params["one"]))
    corners = [inner[:, i : i + 5, j : j + 5] for i in (0, 1) for j in (0, 1)]
    patches = np.float64(np.stack(corners, -2)).reshape(-1, 4, 6)
    wanted = patches.reshape(-1, 24) @ params["two"].reshape(24, 3)
    own = patches[:, :, kept].reshape(len(patches), -1)
    best = np.linalg.lstsq(own, wanted, rcond=None)[0].reshape(2, 2, 3, 3)
    np.testing.assert_allclose(small.params["two"], best, rtol=1e-3, atol=1e-3)


def attention(p, x):
    """Four query heads of three features, two key heads."""
    q = jnp.einsum("btd,dkgf->btkgf", x, p["q"])
    k, v = (jnp.einsum("btd,dkf->btkf", x, p[name]) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("btkgf,bskf->bkgts", q, k), -1)
    heads = jnp.einsum("bkgts,bskf->btkgf", weights, v)
    return x + heads.reshape(*x.shape[:2], 12) @ p["out"]


HEADS = {
    "q": draw(0, 8, 2, 2, 3),
    "k": draw(1, 8, 2, 3),
    "v": draw(2, 8, 2, 3),
    "out": draw(3, 12, 8),
}


def test_the_rows_of_a_head_are_its_features():
    x = draw(4, 2, 5, 8)
    groups = jp.axis_groups(attention, HEADS, x)
    traced = jp.trace(attention, HEADS, x)
    found = unit_rows.consumers(groups, ["k:1", "out:0.1"], traced)
    assert {own.op.name for (own,) in found.values()} == {"out"}
    rows = np.arange(12).reshape(2, 2, 3)  # key heads, query heads of each, features
    np.testing.assert_array_equal(found["k:1"][0].rows, rows.reshape(2, 6))
    of_queries = rows.transpose(1, 0, 2).reshape(2, 6)
    np.testing.assert_array_equal(found["out:0.1"][0].rows, of_queries)


@pytest.mark.full
def test_heads_and_the_query_heads_of_each_go_out_by_one_weight():
    batches = [draw(i, 4, 5, 8) for i in (4, 5)]
    shares = {"k:1": 0.5, "out:0.1": 0.5}
    small = shrink(attention, HEADS, batches, shares)
    assert small.params["out"].shape == (3, 8)
    assert small.report["weights"][0]["groups"] == {"k:1": 1, "out:0.1": 1}
    (head,), (query,) = (small.report["kept"][name] for name in shares)
    kept = small.params["q"][:, 0, 0]
    np.testing.assert_array_equal(kept, HEADS["q"][:, head, query])


@pytest.mark.full
def test_layers_of_a_stack_are_solved_one_by_one():
    stack = {"up": draw(0, 2, 5, 8), "down": draw(1, 2, 8, 5)}

    def scanned(params, x):
        def layer(x, own):
            return x + jnp.tanh(x @ own["up"]) @ own["down"], None

        return jax.lax.scan(layer, x, params)[0]

    def unrolled(layers, x):
        for own in layers:
            x = x + jnp.tanh(x @ own["up"]) @ own["down"]
        return x

    layers = [{name: of[i] for name, of in stack.items()} for i in range(2)]
    found = shrink(scanned, stack, BATCHES, 0.5).params
    alone = shrink(unrolled, layers, BATCHES, 0.5).params
    for i, own in enumerate(alone):
        for name, leaf in own.items():
            np.testing.assert_allclose(found[name][i], leaf, rtol=1e-4, atol=1e-5)


def test_a_budget_is_met():
    small = shrink(fn, PARAMS, BATCHES, {"parameters": 0.7})
    before, after = (small.report[name]["parameters"] for name in ("before", "after"))
    assert after <= 0.7 * before


def test_nothing_asked_for_changes_nothing():
    small = shrink(fn, PARAMS, BATCHES, 1.0)
    assert small.report["weights"] == []
    jax.tree.map(np.testing.assert_array_equal, small.params, PARAMS)


def test_lazy_leaves_and_the_callers_own_stay_what_they_are():
    def read(leaf):
        return LazyArray(leaf.shape, leaf.dtype, lambda: jnp.asarray(leaf))

    arrays = jax.tree.map(jnp.asarray, PARAMS)
    found = shrink(fn, jax.tree.map(read, PARAMS), BATCHES, 0.5).params
    direct = shrink(fn, arrays, BATCHES, 0.5).params
    assert isinstance(found["first"]["up"], LazyArray)
    np.testing.assert_array_equal(found["first"]["down"], direct["first"]["down"])
    jax.tree.map(np.testing.assert_array_equal, arrays, PARAMS)


class Stopped(Exception):
    """On purpose."""


def test_a_job_killed_in_a_layer_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    expected = shrink(fn, PARAMS, BATCHES, 0.5, correction=0.5)
    remove, calls = units.remove_from_all, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return remove(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(units, "remove_from_all", stopping)
        with pytest.raises(Stopped):
            shrink(fn, PARAMS, BATCHES, 0.5, correction=0.5, directory=tmp_path)
    monkeypatch.setattr(
        units, "remove_from_all", lambda *a, **k: calls.append(2) or remove(*a, **k)
    )
    found = shrink(fn, PARAMS, BATCHES, 0.5, correction=0.5, directory=tmp_path)
    assert calls == [1, 1, 2]  # the first layer is there already
    assert found.report == expected.report
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    with pytest.raises(ValueError, match="correction was"):
        shrink(fn, PARAMS, BATCHES, 0.5, directory=tmp_path)


def test_the_report_is_json_and_has_a_row_for_each_updated_weight():
    small = shrink(fn, PARAMS, BATCHES, 0.5)
    rows = json.loads(json.dumps(small.report))["weights"]
    assert [row["name"] for row in rows] == ["first/down", "second/down"]
    assert all(0 < row["error"] < 1 for row in rows)


def tied(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["up"].T


def no_way(p, x):
    return jnp.sum(jnp.tanh(x @ p["up"]) * p["scale"][None], 1)


UP = {"up": draw(0, 5, 8)}


@pytest.mark.parametrize(
    ("fn", "params", "options", "told"),
    [
        (
            tied,
            UP | {"bias": draw(1, 8)},
            {},
            "'up' is also read transposed or in part",
        ),
        (no_way, UP | {"scale": draw(1, 8)}, {}, "'scale:0'.*'none'"),
        (fn, PARAMS, {"keep": None}, "needs keep"),
        (fn, PARAMS, {"keep": {"bytes": 1.5}}, "a share in"),
        (fn, PARAMS, {"damping": 3.0}, "damping must be"),
        (fn, PARAMS, {"batches": []}, "shrink needs at least one batch"),
        (fn, PARAMS, {"batches": [BATCHES[0], BATCHES[1][:9]]}, "those at '?1"),
        (fn, PARAMS, {"batches": [np.nan * BATCHES[0]]}, "must be finite"),
    ],
)
def test_what_does_not_fit_is_refused(fn, params, options, told):
    with pytest.raises(ValueError, match=told):
        shrink(fn, params, **({"batches": BATCHES} | options))


@pytest.mark.parametrize(
    "choose",
    [
        "alps",
        jp.passes.sparsegpt(0.5),
        jp.passes.sparsegpt(pattern="2:4"),
        jp.passes.chain(jp.passes.sparsegpt(), jp.passes.quantize()),
    ],
)
def test_passes_that_are_not_for_units_are_refused(choose):
    with pytest.raises(ValueError, match='units are chosen by "sparsegpt"'):
        jp.shrink(fn, PARAMS, BATCHES, choose, 0.5)


def test_a_weight_that_is_not_finite_is_named():
    bad = PARAMS | {"second": PARAMS["second"] | {"down": np.nan * draw(0, 8, 5)}}
    with pytest.raises(ValueError, match="'second/down' holds NaN"):
        shrink(fn, bad, BATCHES, 0.5)
