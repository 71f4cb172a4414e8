"""A small decoder without options."""

import functools

from flax import nnx

from jaxprune.models.decoder import rope
from jaxprune.models.decoder.model import Decoder, DecoderConfig

PLAIN = DecoderConfig(
    vocab_size=97,
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    ropes=(rope.linear(1e4, 8),),
)


@functools.cache
def plain():
    return Decoder(PLAIN, rngs=nnx.Rngs(0))
