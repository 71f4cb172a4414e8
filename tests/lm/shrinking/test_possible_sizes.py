"""The numbers that a share of heads is checked against."""

import pytest

from jaxprune.lm.models.decoder.config import DecoderConfig, LayerSizes
from jaxprune.lm.shrinking import units
from jaxprune.lm.shrinking.possible_sizes import fewest_units


def config(*layers):
    """A model of four query heads and two key heads, by layer as it is said."""
    sizes = tuple(LayerSizes(*heads, 8) for heads in layers)
    return DecoderConfig(
        vocab_size=16,
        context=8,
        layers=len(layers) or 2,
        width=16,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp_width=8,
        layer_sizes=sizes,
    )


@pytest.mark.parametrize(
    ("layers", "fewest"),
    [
        ((), (2, 2)),
        (((4, 2), (2, 1)), (2, 2)),
        (((4, 2), (3, 1), (0, 0)), (2, 2)),
        (((4, 4), (6, 3), (1, 1)), (3, 2)),
    ],
)
def test_the_layer_with_fewest_units_counts(layers, fewest):
    assert fewest_units(config(*layers)) == fewest


def test_a_layer_with_one_key_head_loses_the_share_of_query_heads():
    roles = {"layers/0/k": "heads", "layers/1/k": "heads", "layers/0/q": "query heads"}
    narrowing = units.Narrowing(query_heads=0.5)
    request = units.narrowing_request(narrowing, roles, config((4, 2), (2, 1)))
    shares = {"layers/0/k": 0.0, "layers/1/k": 0.5, "layers/0/q": 0.5}
    assert request["sparsity"] == shares
