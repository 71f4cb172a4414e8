"""What may happen to a leaf before its matmul: it is pruned as if it had not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxprune as jp
from tests.support.small_models import correlated, draw

pytestmark = pytest.mark.jax_api

IN, OUT = 8, 6
W, X = draw(1, IN, OUT), correlated(2, 40, IN)
FACTOR = jnp.float32(0.3)


def prune(fn, params, batches, method="sparsegpt"):
    return jp.prune_trained(fn, params, batches, method=method, sparsity=0.5)


@functools.cache
def plainly():
    """What no way changes."""
    return prune(lambda p, x: x @ p["w"], {"w": W}, [X])


WAYS = {
    "frozen": lambda w, x: x @ lax.stop_gradient(w),
    "times a number": lambda w, x: x @ (w * 2.0),
    "a number times": lambda w, x: x @ (3 * w),
    "over a number": lambda w, x: x @ (w / np.sqrt(IN)),
    "times a constant array": lambda w, x: x @ (w * FACTOR),
    "negated": lambda w, x: x @ -w,
    "frozen, cast and scaled": lambda w, x: (
        x @ (lax.stop_gradient(w).astype(jnp.bfloat16).astype(jnp.float32) / 4)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_factor_and_a_stopped_gradient_change_no_weight(way):
    plain = plainly()
    found = prune(lambda p, x: WAYS[way](p["w"], x), {"w": W}, [X])
    np.testing.assert_array_equal(found.params["w"], plain.params["w"])
    row, expected = found.report["weights"][0], plain.report["weights"][0]
    assert row["error"] == pytest.approx(expected["error"])


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda p, x: x @ (p["w"] * jnp.arange(1.0, 1 + OUT)[None]), "mul"),
        (lambda p, x: x @ (1 / p["w"]), "div"),
        (lambda p, x: x @ (p["w"] * p["w"]), "mul"),
        (lambda p, x: x @ (p["w"] * x.max()), "mul"),
    ],
    ids=["a factor for each output", "inverted", "squared", "by the batch"],
)
def test_what_could_change_the_order_of_weights_is_not_seen(fn, reason):
    traced = jp.trace(fn, {"w": W}, X)
    assert traced.linear_ops == ()
    assert traced.unseen["w"].startswith(f"is an operand of {reason}")


@pytest.mark.full
def test_a_scaled_layer_of_a_stack_is_put_back_where_it_was():
    stack = draw(3, 3, IN, IN)

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ (w / 2)), None), x, p["w"])[0]

    found = prune(fn, {"w": stack}, [X], "magnitude").params["w"]
    for before, after in zip(stack, np.asarray(found), strict=True):
        kept = after != 0
        assert kept.sum() == before.size // 2
        np.testing.assert_array_equal(after[kept], before[kept])
        assert np.abs(before[kept]).min() >= np.abs(before[~kept]).max()


@pytest.mark.parametrize("turned", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_kernel_of_a_transposed_convolution_is_seen(turned):
    kernel = draw(4, 3, *((OUT, IN) if turned else (IN, OUT)))
    x = correlated(5, 2 * 10, IN).reshape(2, 10, IN)

    def fn(p, x):
        return lax.conv_transpose(
            x, p["k"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"),
            transpose_kernel=turned,
        )  # fmt: skip

    (op,) = jp.trace(fn, {"k": kernel}, x).linear_ops
    assert op.shape == (1, 3 * IN, OUT)
    patches = op.source.read(x)
    seen = op.view.read(jnp.asarray(kernel))
    expected = np.asarray(fn({"k": kernel}, x)).reshape(-1, OUT)
    found = np.einsum("bsi,bio->so", patches, seen)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    again = op.view.write(jnp.asarray(np.zeros_like(kernel)), seen, donate=False)
    np.testing.assert_array_equal(again, kernel)
    after = np.asarray(prune(fn, {"k": kernel}, [x], "wanda").params["k"])
    assert (after == 0).sum() == kernel.size // 2


@pytest.mark.full
@pytest.mark.parametrize(
    "join", [jnp.stack, pytest.param(jnp.concatenate, marks=pytest.mark.full)]
)
def test_layers_that_are_joined_to_be_scanned_are_each_seen(join):
    layers = {f"layer_{i}": draw(10 + i, IN, IN) for i in range(3)}

    def scanned(p, x):
        whole = join(list(p.values())).reshape(3, IN, IN)
        if join is jnp.concatenate:
            whole = [join(list(p.values()))[i * IN : (i + 1) * IN] for i in range(3)]
            for w in whole:
                x = jnp.tanh(x @ w)
            return x
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, whole)[0]

    def plain(p, x):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return x

    found, expected = (prune(fn, layers, [X]).params for fn in (scanned, plain))
    for name in layers:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        assert (np.asarray(found[name]) == 0).sum() == IN * IN // 2


def test_a_branch_that_is_the_only_one_is_seen():
    def fn(p, x):
        branch = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
        return lax.cond(x.sum() > 0, branch, branch, p["w"], x)

    plain = prune(lambda p, x: jnp.tanh(x @ p["w"]), {"w": W}, [X])
    found = prune(fn, {"w": W}, [X])
    np.testing.assert_array_equal(found.params["w"], plain.params["w"])


def test_gate_and_up_that_take_turns_are_two_weights():
    wide = draw(8, IN, 2 * OUT)

    def turns(p, x):
        both = p["w"]
        return jax.nn.silu(x @ both[:, ::2]) * (x @ both[:, 1::2])

    def apart(p, x):
        return jax.nn.silu(x @ p["gate"]) * (x @ p["up"])

    found = prune(turns, {"w": wide}, [X])
    names = [row["name"] for row in found.report["weights"]]
    assert names == ["w[:,0:11:2]", "w[:,1:12:2]"]
    alone = prune(apart, {"gate": wide[:, ::2], "up": wide[:, 1::2]}, [X]).params
    after = np.asarray(found.params["w"])
    np.testing.assert_array_equal(after[:, ::2], alone["gate"])
    np.testing.assert_array_equal(after[:, 1::2], alone["up"])


EXPERTS = {"up": draw(6, 3, IN, OUT), "down": draw(7, 3, OUT, IN)}
SIZES = jnp.array([17, 0, 20], jnp.int32)  # three rows are nobody's


def ragged(p, batch):
    hidden = jnp.tanh(lax.ragged_dot(batch["x"], p["up"], batch["sizes"]))
    return lax.ragged_dot(hidden, p["down"], batch["sizes"])


@functools.cache
def experts(method="sparsegpt"):
    """On one device, with the groups' sizes in the batch."""
    return prune(ragged, EXPERTS, [{"x": X, "sizes": SIZES}], method)


@pytest.mark.full
def test_experts_that_lie_on_several_devices_are_pruned_as_on_one():
    mesh = jax.make_mesh((3,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.NamedSharding(mesh, jax.P("x"))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, where), EXPERTS)
    batch = {"x": X, "sizes": SIZES}
    for method in ("wanda", "sparsegpt"):
        expected = experts(method).params
        found = prune(ragged, placed, [batch], method).params
        for name in EXPERTS:
            assert found[name].sharding == where
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.full
def test_groups_that_are_the_same_in_every_batch_are_seen_too():
    def fixed(p, x):
        return ragged(p, {"x": x, "sizes": SIZES})

    expected = experts().params
    found = prune(fixed, EXPERTS, [X]).params
    for name in EXPERTS:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.full
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_of_ragged_dot_are_pruned_one_by_one_for_their_own_rows(method):
    found = experts(method)
    assert [row["by_magnitude"] for row in found.report["weights"]] == [[1], [1]]
    for i, rows in ((0, slice(0, 17)), (2, slice(17, 37))):
        own = {name: leaf[i] for name, leaf in EXPERTS.items()}
        alone = prune(
            lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], own, [X[rows]], method
        )
        for name in EXPERTS:
            after = np.asarray(found.params[name])
            np.testing.assert_allclose(after[i], alone.params[name], atol=1e-5)


def test_the_program_of_ragged_dot_computes_what_it_did():
    x, w = jnp.asarray(X), jnp.asarray(EXPERTS["up"])
    traced = jp.trace(
        lambda p, b: lax.ragged_dot(b["x"], p["w"], b["sizes"]),
        {"w": w},
        {"x": x, "sizes": SIZES},
    )
    from jaxprune.graph import program

    flat = traced.program
    steps = program.steps_to(
        flat, flat.outputs, set(flat.leaves + flat.batch).__contains__
    )
    part = program.subgraph(flat, steps, flat.outputs)
    given = dict(zip(flat.leaves + flat.batch, [w, SIZES, x], strict=True))
    (found,) = part.run(*(given[n] for n in part.inputs))
    np.testing.assert_allclose(found, lax.ragged_dot(x, w, SIZES), atol=1e-5)


def test_a_stopped_gradient_and_vmap_around_it_do_not_matter():
    fn = jax.vmap(lambda p, x: x @ (lax.stop_gradient(p["w"]) * 2), in_axes=(None, 0))
    traced = jp.trace(fn, {"w": W}, X)
    assert [op.name for op in traced.linear_ops] == ["w"]


# Kernels that are joined along their outputs, as a fused qkv or the gates of an LSTM.

JOINED = {
    "columns": lambda p: jnp.concatenate([p["a"], p["b"]], 1),
    "rows, turned": lambda p: jnp.concatenate([p["a"].T, p["b"].T], 0).T,
    "cast": lambda p: jnp.concatenate([p["a"], p["b"]], 1).astype(jnp.bfloat16),
}
BOTH = {"a": draw(7, IN, OUT), "b": draw(8, IN, 2 * OUT), "down": draw(9, 3 * OUT, 4)}


@pytest.mark.full
@pytest.mark.parametrize("way", JOINED)
def test_kernels_joined_along_their_outputs_are_pruned_as_if_apart(way):
    def apart(p, x):
        return jnp.tanh(jnp.concatenate([x @ p["a"], x @ p["b"]], 1)) @ p["down"]

    expected = prune(apart, BOTH, [X]).params
    seen = prune(lambda p, x: jnp.tanh(x @ JOINED[way](p)) @ p["down"], BOTH, [X])
    for name in ("a", "b"):
        np.testing.assert_array_equal(seen.params[name], expected[name])


def test_kernels_joined_along_their_inputs_are_not_seen():
    params = {"a": draw(7, 3, OUT), "b": draw(8, IN - 3, OUT)}
    traced = jp.trace(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), params, X)
    assert traced.linear_ops == ()
    assert traced.unseen["a"] == "is an operand of concatenate, dot_general"


@pytest.mark.full
def test_all_kernels_of_an_lstm_that_joins_them_are_pruned_as_of_one_that_does_not():
    x = correlated(3, 5 * 7, IN).reshape(5, 7, IN)
    fast, slow = (nn.RNN(cell(6)) for cell in (nn.OptimizedLSTMCell, nn.LSTMCell))
    params = fast.init(jax.random.key(0), x)
    expected = prune(slow.apply, params, [x], "wanda").params
    found = prune(fast.apply, params, [x], "wanda").params
    for name, kernel in jp.tree.named_leaves(found).items():
        if kernel.ndim == 2:
            assert (np.asarray(kernel) == 0).sum() == kernel.size // 2, name
            np.testing.assert_array_equal(kernel, jp.tree.named_leaves(expected)[name])


# What is said of what is not seen.


def mostly_hidden(p, x):
    return (x @ (p["w"] + p["more"])) @ p["last"]


HIDDEN = {"w": W, "more": W, "last": draw(5, OUT, 2)}


@pytest.mark.full
def test_a_model_of_which_less_than_half_is_seen_warns_and_says_why():
    with pytest.warns(
        UserWarning, match=r"only 12 of 108 .*more \(is an operand of add"
    ):
        prune(mostly_hidden, HIDDEN, [X])


def test_axes_of_a_model_of_which_less_than_half_is_seen_warn_too():
    # A pattern would lie along the usual axes of the leaves without an entry.
    with pytest.warns(UserWarning, match=r"only 12 of 108 .*explain"):
        axes = jp.trace(mostly_hidden, HIDDEN, X).axes()
    assert [*axes] == ["last"]


def test_an_explanation_of_a_trace_names_what_is_hidden_and_what_makes_the_result():
    rows = {row.name: row for row in jp.trace(mostly_hidden, HIDDEN, X).explain()}
    assert [rows[name].pruned for name in ("w", "more", "last")] == [False, False, True]
    assert rows["w"].why == "is an operand of add, dot_general"
    assert rows["last"].why == "pruned, and makes the result"


def test_what_makes_the_result_is_behind_every_other_matrix():
    def fn(p, x):
        x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return {"logits": jax.nn.log_softmax(x @ p["one"] + 1), "value": x @ p["two"]}

    shapes = {"up": (IN, 4), "down": (4, IN), "one": (IN, 3), "two": (IN, 1)}
    params = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    rows = jp.trace(fn, params, X).explain()
    makers = {row.name for row in rows if row.why}
    assert makers == {"one", "two"}
