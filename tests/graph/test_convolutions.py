"""A convolution is the matmul of its kernel with patches: cut out by hand here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.small_models import draw, hessian

# Convolutions: the matmul with patches, cut out by hand.


def patches_by_hand(x, window, strides=None, dilation=None, padding=None, spread=None):
    """Patches of (batch, *space, channels): (batch, *places, channels, *window)."""
    rank = len(window)
    strides, dilation = strides or (1,) * rank, dilation or (1,) * rank
    padding, spread = padding or ((0, 0),) * rank, spread or (1,) * rank
    for axis, gap in enumerate(spread, 1):  # zeros between inputs
        wide = list(x.shape)
        wide[axis] = (x.shape[axis] - 1) * gap + 1
        grown = np.zeros(wide, x.dtype)
        grown[tuple([np.s_[:]] * axis + [np.s_[::gap]])] = x
        x = grown
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    places = [
        range(0, n - r + 1, s)
        for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)
    ]
    shape = [len(p) for p in places]
    found = np.zeros((len(x), *shape, x.shape[-1], *window), x.dtype)
    for at in np.ndindex(*shape):
        box = tuple(
            np.s_[p[i] : p[i] + r : d]
            for p, i, r, d in zip(places, at, reach, dilation, strict=True)
        )
        cut = x[(np.s_[:], *box)]
        found[(np.s_[:], *at)] = np.moveaxis(cut, -1, 1)
    return found


IMAGE = draw(20, 2, 7, 6, 4)  # (batch, height, width, channels)
CONVOLUTIONS = {
    "plain": {},
    "strided": {"window_strides": (2, 3)},
    "dilated": {"rhs_dilation": (2, 1)},
    "padded": {"padding": ((1, 2), (0, 1))},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((2, 2), (1, 1))},
    "grouped": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
    "everything": {
        "window_strides": (2, 1),
        "rhs_dilation": (1, 2),
        "padding": ((1, 1), (2, 2)),
        "feature_group_count": 2,
    },
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_matmul_with_patches(name):
    options = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))}
    options |= CONVOLUTIONS[name]
    groups = options.get("feature_group_count", 1)
    kernel = draw(21, 3, 2, 4 // groups, 8)  # (height, width, in, out)

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    traced = jp.trace(fn, {"w": kernel}, IMAGE)
    (found,) = traced.linear_ops
    assert found.operation == "convolution"
    assert found.shape == (groups, 4 // groups * 6, 8 // groups)
    if groups == 1:
        assert found.axes == jp.Axes((0, 1, 2), (3,))

    x = patches_by_hand(
        IMAGE,
        (3, 2),
        options["window_strides"],
        options.get("rhs_dilation"),
        options["padding"],
        options.get("lhs_dilation"),
    )
    x = x.reshape(-1, groups, 24 // groups).swapaxes(0, 1)  # (groups, samples, in)
    w = kernel.transpose(2, 0, 1, 3).reshape(24 // groups, groups, 8 // groups)
    w = w.swapaxes(0, 1)  # (groups, in, out)
    # The oracle itself: patches times kernel is the convolution.
    result = np.asarray(fn({"w": kernel}, IMAGE))
    by_hand = np.einsum("gsi,gio->sgo", x, w).reshape(result.shape)
    np.testing.assert_allclose(by_hand, result, rtol=1e-4, atol=1e-4)

    np.testing.assert_array_equal(found.view.read(jnp.asarray(kernel)), w)
    moments = jp.calibrate(fn, {"w": kernel}, [IMAGE], hessian=True)["w"]
    assert moments.samples == x.shape[1]
    np.testing.assert_allclose(moments.hessian, hessian(x), rtol=1e-4, atol=1e-4)


def test_a_convolution_may_keep_its_channels_first():
    kernel = draw(22, 5, 4, 3)  # (out, in, width)

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (2,), ((1, 1),), dimension_numbers=("NCH", "OIH", "NCH")
        )

    x = draw(23, 2, 4, 9)
    (found,) = jp.trace(fn, {"w": kernel}, x).linear_ops
    assert found.shape == (1, 12, 5)
    assert found.axes == jp.Axes((1, 2), (0,))
    patches = patches_by_hand(x.swapaxes(1, 2), (3,), (2,), padding=((1, 1),))
    moments = jp.calibrate(fn, {"w": kernel}, [x], hessian=True)["w"]
    np.testing.assert_allclose(
        moments.hessian, hessian(patches.reshape(1, -1, 12)), rtol=1e-4, atol=1e-4
    )


def test_convolutions_of_one_input_share_it_where_their_patches_are_the_same():
    def fn(p, x):
        def conv(w, **options):
            return jax.lax.conv_general_dilated(
                x,
                w,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                **options,
            )

        return conv(p["a"]), conv(p["b"]), conv(p["c"], rhs_dilation=(2, 2))

    params = {n: draw(30 + i, 3, 3, 4, 2) for i, n in enumerate("abc")}
    numbers = [p.input for p in jp.trace(fn, params, IMAGE).linear_ops]
    assert numbers[0] == numbers[1] != numbers[2]
