"""The published size of Phi-3-vision, by shapes alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.phi3_vision import checkpoint
from experiments.phi3_vision.model import Phi3VisionConfig

torch_phi3_vision = pytest.importorskip("tests.support.torch_phi3_vision")

pytestmark = pytest.mark.parity

PUBLISHED = {
    **torch_phi3_vision.CONFIG,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 131072,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
    },
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
}


@functools.cache
def _published():
    return checkpoint.abstract(checkpoint.vision_config(PUBLISHED))


def test_the_published_size_has_as_many_parameters_as_published():
    params = nnx.state(_published(), nnx.Param)
    assert 4.14e9 < sum(x.size for x in jax.tree.leaves(params)) < 4.2e9


def test_a_picture_goes_through_the_published_size():
    graphdef, params = nnx.split(_published(), nnx.Param)
    tokens = jax.ShapeDtypeStruct((1, 400), jnp.int32)
    pixels = jax.ShapeDtypeStruct((2, 336, 336, 3), jnp.float32)
    logits = jax.eval_shape(
        lambda p, *x: nnx.merge(graphdef, p)(*x), params, tokens, pixels, tokens
    )
    assert logits.shape == (1, 400, 32064)
    rope = checkpoint.vision_config(PUBLISHED).decoder.rope(0)
    assert rope.scale == pytest.approx(1.190238, abs=1e-6)


@pytest.mark.parametrize("changes", [{"crops": 0}, {"skipped": 2}, {"skipped": -1}])
def test_shapes_that_do_not_fit_are_refused(changes):
    config = checkpoint.vision_config(torch_phi3_vision.CONFIG)
    with pytest.raises(ValueError, match="Phi3VisionConfig needs"):
        dataclasses.replace(config, **changes)


def test_an_odd_grid_is_refused():
    config = checkpoint.vision_config(torch_phi3_vision.CONFIG)
    tower = dataclasses.replace(config.tower, image=42)
    with pytest.raises(ValueError, match="even number"):
        Phi3VisionConfig(decoder=config.decoder, tower=tower)
