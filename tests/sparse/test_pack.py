"""`jp.pack` gives the original function's results, and says what it has not packed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.sparse.packed_matrix import PackedMatrix
from tests.support.packed import sparse_matrix

pytestmark = pytest.mark.jax_api

X = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)


def weight(seed, *shape, density=0.3, dtype="float32"):
    return sparse_matrix(seed, shape, density, dtype)


def mlp(params, x):
    hidden = x @ params["up"]
    hidden = jax.nn.gelu(hidden + jnp.broadcast_to(params["bias"], hidden.shape))
    return hidden @ params["down"]


MLP = {"up": weight(0, 64, 96), "bias": weight(1, 96), "down": weight(2, 96, 32)}


def same(fn, params, *batches, packed, **options):
    """Packs a function, checks what it packs and what it gives; the result."""
    result = jp.pack(fn, params, batches[0], **options)
    rows = result.report["weights"]
    assert {name for name, row in rows.items() if row["packed"]} == set(packed)
    for batch in batches:
        expected = jax.tree.leaves(fn(params, batch))
        leaves = jax.tree.leaves(jax.jit(result.fn)(result.params, batch))
        for leaf, dense in zip(leaves, expected, strict=True):
            assert leaf.dtype == dense.dtype
            np.testing.assert_allclose(
                np.asarray(leaf, np.float64), np.asarray(dense, np.float64), 2e-5, 2e-5
            )
    json.dumps(result.report)
    return result


@pytest.mark.full
def test_a_function_of_packed_weights_gives_the_same_for_any_batch():
    result = same(mlp, MLP, X, X[0], X[None], X[:0], packed=["up", "down"])
    assert isinstance(result.params["up"], PackedMatrix)
    assert result.params["up"].shape == (96, 64)
    assert result.params["bias"] is MLP["bias"]
    rows = result.report["weights"]
    assert rows["bias"]["reason"] == "has less than two axes"
    assert rows["up"]["zeros"] == pytest.approx(np.mean(MLP["up"] == 0))
    assert result.report["after"] < 0.6 * result.report["before"]
    assert "path" in result.report


def test_a_weight_that_is_no_smaller_packed_stays_unless_asked_for():
    params = {"up": weight(0, 64, 96, density=1), "bias": MLP["bias"]}
    params["down"] = MLP["down"]
    result = same(mlp, params, X, packed=["down"])
    assert result.report["weights"]["up"]["reason"] == "is no smaller packed"
    same(mlp, params, X, packed=["up", "down"], dense=True)


def test_a_packed_function_is_scanned_over():
    def step(params, x):
        return jnp.tanh(x @ params["w"])

    params = {"w": weight(3, 64, 64)}
    result = jp.pack(step, params, X)

    def rolled(fn, params):
        return jax.lax.scan(lambda x, _: (fn(params, x), None), X, None, length=3)[0]

    np.testing.assert_allclose(
        jax.jit(lambda p: rolled(result.fn, p))(result.params),
        rolled(step, params),
        rtol=1e-4,
        atol=1e-5,
    )


def test_stacked_layers_under_a_scan_are_packed_layer_by_layer():
    def fn(params, x):
        def layer(x, weights):
            return jnp.tanh(x @ weights["in"]) @ weights["out"] + x, None

        return jax.lax.scan(layer, x, params)[0]

    params = {"in": weight(4, 3, 64, 96), "out": weight(5, 3, 96, 64)}
    result = same(fn, params, X, X[:1], packed=["in", "out"])
    assert [matrix.shape for matrix in result.params["in"]] == [(96, 64)] * 3
    assert result.report["weights"]["in"]["matrices"] == 3


def test_layers_that_are_stacked_to_be_scanned_are_packed():
    def fn(params, x):
        stack = jnp.stack([params["a"], params["b"]])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    same(fn, {"a": weight(6, 64, 64), "b": weight(7, 64, 64)}, X, packed=["a", "b"])


def test_an_embedding_that_the_head_shares_is_packed_once():
    def fn(params, tokens):
        hidden = jnp.tanh(params["embedding"][tokens])
        return hidden @ params["embedding"].T

    params = {"embedding": jnp.asarray(weight(8, 50, 64))}
    tokens = np.array([[3, 0, 49], [60, -1, 7]])  # one is out of bounds
    result = same(fn, params, tokens, tokens[0], packed=["embedding"])
    assert result.report["weights"]["embedding"]["matrices"] == 1


def test_a_bfloat16_leaf_that_is_multiplied_wider_is_stored_narrow():
    def fn(params, x):
        table = params["e"]
        hidden = table[jnp.arange(2)].astype(jnp.float32) + x[:2]
        return hidden @ table.astype(jnp.float32).T

    params = {"e": jnp.asarray(weight(9, 80, 64, dtype="bfloat16"))}
    result = same(fn, params, X, packed=["e"])
    assert result.params["e"].encoding == "bfloat16"


def test_products_in_bfloat16_are_rounded_once():
    params = {"w": weight(10, 64, 96, dtype="bfloat16")}
    x = jnp.asarray(X, jnp.bfloat16)
    result = jp.pack(lambda p, x: x @ p["w"], params, x)
    product = result.fn(result.params, x)
    exact = np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64)
    assert product.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(product, np.float64), exact, 2**-8, 1e-5)


def test_a_weight_that_is_scaled_by_a_constant_is_packed_scaled():
    def fn(params, x):
        return x @ (params["w"] * 0.125) + x @ params["w"]

    same(fn, {"w": weight(11, 64, 64)}, X, packed=["w"])


def test_parts_of_a_fused_weight_are_packed_apart():
    def fn(params, x):
        q, k = jnp.split(params["qk"], 2, axis=1)
        return jnp.sum((x @ q) * (x @ k), axis=-1)

    result = same(fn, {"qk": weight(12, 64, 128)}, X, packed=["qk"])
    assert len(result.params["qk"]) == 2


def test_experts_are_a_batch_of_matrices():
    def fn(params, x):
        return jnp.einsum("sd,edf->esf", x, params["up"]).sum(0)

    def batched(params, x):
        return jnp.einsum("esd,edf->esf", jnp.stack([x, 2 * x, -x]), params["up"])

    params = {"up": weight(13, 3, 64, 48)}
    for function in (fn, batched):
        result = same(function, params, X, X[:1], packed=["up"])
    assert result.params["up"].shape == (3, 48, 64)


@pytest.mark.parametrize(
    "equation", ["bd,nhd->bnh", "nhd,bd->nhb", "bnh,nhd->bd", "bnh,dhn->bd"]
)
def test_any_order_of_axes_is_packed(equation):
    operands = equation.split("->")[0].split(",")
    sizes = {"b": 4, "d": 32, "n": 4, "h": 8}
    side = (
        0 if operands[0] != operands[0].replace("d", "") and "n" in operands[0] else 1
    )
    shapes = [[sizes[axis] for axis in axes] for axes in operands]
    if "b" in operands[side]:
        side = 1 - side
    x = np.random.default_rng(3).normal(size=shapes[1 - side]).astype(np.float32)

    def fn(params, x):
        pair = (params["w"], x) if side == 0 else (x, params["w"])
        return jnp.einsum(equation, *pair)

    same(fn, {"w": weight(14, *shapes[side])}, x, packed=["w"])


@pytest.mark.full
def test_experts_of_sorted_rows_are_packed():
    params = {
        "experts": weight(16, 3, 64, 48),
        "whole": weight(24, 3, 64, 48, density=1),
    }

    def fn(params, batch):
        rows, sizes = batch
        first = jax.lax.ragged_dot(rows, params["experts"], sizes)
        return first + jax.lax.ragged_dot(rows, params["whole"], sizes)

    rows = np.random.default_rng(4).normal(size=(90, 64)).astype(np.float32)
    # Few rows, as in decoding, an expert without any, many; the last belong to none.
    batches = [
        (rows[:count], np.array(sizes, np.int32))
        for count, sizes in [(2, [1, 0, 1]), (9, [2, 7, 0]), (90, [70, 3, 10])]
    ]
    same(fn, params, *batches, packed=["experts"])
    same(fn, params, *batches, packed=["experts", "whole"], dense=True)
    for values in ("int8", "int4"):
        result = jp.pack(fn, params, batches[0], values=values, group=32, dense=True)
        rounded = {k: m.unpack().transpose(0, 2, 1) for k, m in result.params.items()}
        for batch in batches:
            np.testing.assert_allclose(
                result.fn(result.params, batch), fn(rounded, batch), 1e-4, 1e-4
            )


@pytest.mark.parametrize(
    ("layout", "shape", "kernel"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 5, 6, 64), (1, 1, 64, 32)),
        (("NCHW", "OIHW", "NCHW"), (2, 64, 5, 6), (32, 64, 1, 1)),
        (("NCHW", "HWIO", "NHWC"), (2, 64, 5, 6), (1, 1, 64, 32)),
        (("NWC", "WIO", "NWC"), (2, 5, 64), (1, 64, 32)),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_one_pixel_are_products(layout, shape, kernel, stride):
    def fn(params, x):
        strides = (stride,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(
            x, params["conv"], strides, "VALID", dimension_numbers=layout
        )

    x = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    same(fn, {"conv": weight(15, *kernel)}, x, packed=["conv"])


def test_what_is_not_packed_has_a_reason():
    def fn(params, x):
        image = x.reshape(1, 8, 8, 4)
        convolved = jax.lax.conv_general_dilated(
            image,
            params["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        shown = x @ params["shown"]
        return (
            convolved.sum(),
            shown,
            jnp.sin(params["shown"]),
            params["table"][x.shape[0]],
        )

    params = {
        "conv": weight(15, 3, 3, 4, 4),
        "shown": weight(17, 64, 64),
        "table": weight(18, 64, 64),
        "ids": np.ones((4, 4), np.int32),
    }
    result = jp.pack(fn, params, X)
    rows = result.report["weights"]
    reasons = {name: row["reason"] for name, row in rows.items()}
    assert not any(row["packed"] for row in rows.values())
    assert reasons["conv"] == "is an operand of conv_general_dilated"
    assert reasons["shown"] == "is an operand of sin"
    assert reasons["ids"] == "is not used"
    for a, b in zip(result.fn(result.params, X), fn(params, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_weight_that_the_function_returns_is_not_packed():
    params = {"w": weight(19, 64, 64)}
    result = jp.pack(lambda p, x: (x @ p["w"], p["w"]), params, X)
    assert result.report["weights"]["w"]["reason"] == "is a result of the function"


@pytest.mark.full
def test_values_are_rounded_by_name():
    values = {"up": "int8", "*": "bfloat16"}
    result = jp.pack(mlp, MLP, X, values=values, group=32)
    assert result.params["up"].encoding == "int8"
    assert result.params["down"].encoding == "bfloat16"
    rounded = {
        name: leaf.unpack().T if isinstance(leaf, PackedMatrix) else leaf
        for name, leaf in result.params.items()
    }
    np.testing.assert_allclose(
        result.fn(result.params, X), mlp(rounded, X), rtol=1e-4, atol=1e-5
    )
    # int8 keeps about a hundredth of the largest weight.
    np.testing.assert_allclose(result.fn(result.params, X), mlp(MLP, X), atol=0.5)


def test_numbers_and_random_keys_may_be_leaves():
    params = {"w": weight(3, 64, 96), "scale": 0.5, "key": jax.random.key(0)}

    def fn(params, x):
        noise = jax.random.normal(params["key"], x.shape)
        return (x + noise) @ params["w"] * params["scale"]

    same(fn, params, X, packed=["w"])


def test_a_matrix_of_too_many_weights_stays(monkeypatch):
    monkeypatch.setattr("jaxprune.sparse.pack.MOST", 64 * 96 - 1)
    result = same(mlp, MLP, X, packed=["down"])
    reason = result.report["weights"]["up"]["reason"]
    assert reason == "has more than 6143 weights where it is multiplied"


def test_zeros_of_a_matrix_that_is_stored_whole_are_counted():
    params = {"w": weight(4, 64, 64, density=0.8)}
    zeros = float((params["w"] == 0).mean())
    for values in ("float32", "int8"):
        result = jp.pack(lambda p, x: x @ p["w"], params, X, values=values, dense=True)
        assert result.report["weights"]["w"]["zeros"] == pytest.approx(zeros)


def test_lazy_leaves_are_read():
    lazy = {
        name: jp.LazyArray(leaf.shape, leaf.dtype, lambda leaf=leaf: jnp.asarray(leaf))
        for name, leaf in MLP.items()
    }
    result = jp.pack(mlp, lazy, X)
    np.testing.assert_allclose(
        result.fn(result.params, X), mlp(MLP, X), rtol=1e-4, atol=1e-5
    )


def test_inputs_have_gradients_and_packed_weights_have_none():
    result = jp.pack(mlp, MLP, X)
    gradient = jax.grad(lambda x: result.fn(result.params, x).sum())(X)
    expected = jax.grad(lambda x: mlp(MLP, x).sum())(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="packed weights have no gradients"):
        jax.grad(lambda p: result.fn(p, X).sum(), allow_int=True)(result.params)


def test_inputs_of_packed_experts_have_gradients_under_jit():
    params = {"e": weight(5, 3, 64, 48)}
    sizes = jnp.array([1, 0, 3])

    def fn(params, x):
        return jax.lax.ragged_dot(x, params["e"], sizes)

    def loss(fn, params):
        return lambda x: jnp.sin(fn(params, x)).sum()

    result = jp.pack(fn, params, X)
    gradient = jax.jit(jax.grad(loss(result.fn, result.params)))(X)
    np.testing.assert_allclose(gradient, jax.grad(loss(fn, params))(X), 1e-4, 1e-4)
    with pytest.raises(TypeError, match="packed weights have no gradients"):
        jax.grad(lambda p: result.fn(p, X).sum(), allow_int=True)(result.params)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_packed_function_is_exported(platform):
    result = jp.pack(mlp, MLP, X)
    exported = jax.export.export(jax.jit(result.fn), platforms=[platform])
    program = exported(result.params, X).mlir_module()
    assert "custom_call" not in program  # in JAX's own operations


def test_an_exported_function_is_read_back():
    pytest.importorskip("flatbuffers")
    result = jp.pack(mlp, MLP, X)
    check = jax.export.DisabledSafetyCheck.custom_call("jaxprune_packed_multiply")
    program = jax.export.export(jax.jit(result.fn), disabled_checks=[check])
    content = program(result.params, X).serialize()
    again = jax.export.deserialize(content)
    np.testing.assert_allclose(
        again.call(result.params, X), mlp(MLP, X), rtol=1e-4, atol=1e-5
    )


def test_a_batch_that_needs_the_weight_otherwise_is_refused():
    def fn(params, x):
        return x @ params["w"] if x.ndim > 1 else x + params["w"][0]

    result = jp.pack(fn, {"w": weight(20, 64, 64)}, X)
    with pytest.raises(ValueError, match=r"'w' are needed otherwise; call jp\.pack"):
        result.fn(result.params, X[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"values": "int3"}, r"values must be .*got \['int3'\]"),
        ({"group": 24}, "group must be a multiple of 16 inputs.*got 24"),
        ({"values": {"q/*": "int8"}}, "every values rule must match a leaf"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        jp.pack(mlp, MLP, X, **options)


def test_abstract_parameters_are_refused():
    abstract = jax.eval_shape(lambda: MLP)
    with pytest.raises(TypeError, match="'bias', 'down', 'up' are abstract"):
        jp.pack(mlp, abstract, X)


def test_other_containers_are_refused():
    result = jp.pack(mlp, MLP, X)
    with pytest.raises(ValueError, match="in the containers that pack returned"):
        result.fn({"up": result.params["up"]}, X)
