"""Figures show what is counted."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

RNG = np.random.default_rng(0)
PARAMS = {
    "up": jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32),
    "down": jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
}


def test_bars_cells_and_pixels_show_what_is_counted():
    scores = jp.scores.magnitude(PARAMS)
    masks = jp.masks.make(scores, 0.5)
    others = jp.masks.make({k: 9 - leaf for k, leaf in scores.items()}, 0.5)
    bars = jp.plot.by_layer(masks).patches
    counts = jp.sparsity(masks).by_leaf.values()
    assert [bar.get_width() for bar in bars] == [100 * a / b for a, b in counts]
    pixels = np.asarray(jp.plot.masks(masks["up"]).images[0].get_array())
    np.testing.assert_array_equal(pixels, masks["up"])
    shares = jp.plot.overlap({"a": masks, "b": others}).images[0].get_array()
    both = sum(int((masks[k] & others[k]).sum()) for k in masks)
    either = sum(int((masks[k] | others[k]).sum()) for k in masks)
    np.testing.assert_allclose(shares, [[1, both / either], [both / either, 1]])


def test_a_vector_and_a_single_mask_are_refused():
    with pytest.raises(ValueError, match="must have two axes or more"):
        jp.plot.masks(jnp.ones(3))
    with pytest.raises(TypeError, match="overlap draws two masks or more by name"):
        jp.plot.overlap({"a": PARAMS})
