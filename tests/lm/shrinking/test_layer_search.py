"""Which layers go, beside models that are built without them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.shrinking import layer_search
from tests.support import tiny_cli
from tests.support.compilations import compiled
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=19, context=8, layers=4, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 19, (6, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def split():
    """A model whose layers matter."""
    return nnx.split(initial(CONFIG, seed=2, scale=3), nnx.Param)


def logged(params, kept):
    """Log probabilities, float64, of a model that is built without the other layers."""
    config, own = hf.keep_layers(CONFIG, params, kept)
    assert config == dataclasses.replace(CONFIG, layers=len(kept))
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    logits = tiny_cli.called(nnx.merge(graphdef, own), TOKENS[:, :-1])
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.full
def test_each_time_that_layer_goes_which_changes_the_predictions_least(split):
    dense = logged(split[1], range(4))
    left, dropped, nats = list(range(4)), [], []
    for _ in range(3):
        changes = {}
        for gone in left:
            own = logged(split[1], [layer for layer in left if layer != gone])
            changes[gone] = (np.exp(dense) * (dense - own)).sum(-1).mean()
        best = min(changes, key=changes.get)
        left.remove(best)
        dropped.append(best)
        nats.append(changes[best])
    ticks = []
    found = layer_search.search_layers(
        *split, TOKENS, 1, batch=4, progress=ticks.append
    )
    assert (found.kept, found.dropped) == (left, dropped)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4)
    assert sum(ticks) == 2 * (1 + 4 + 3 + 2)  # of two batches


@pytest.mark.full
def test_what_is_behind_already_is_not_seen_any_further(split):
    """With as many batches as sequences, the same layers go by fewer of them."""
    ticks = []
    found = layer_search.search_layers(
        *split, TOKENS, 1, batch=1, progress=ticks.append
    )
    assert (
        found.dropped == layer_search.search_layers(*split, TOKENS, 1, batch=6).dropped
    )
    assert sum(ticks) == 6 * (1 + 4 + 3 + 2)
    assert ticks.count(1) < 6 * (4 + 3 + 2)


@pytest.mark.full
def test_a_search_that_was_begun_ends_as_the_whole_one(split):
    noted = []
    whole = layer_search.search_layers(
        *split, TOKENS, 1, save=lambda x: noted.append(repr(x))
    )
    first = layer_search.search_layers(*split, TOKENS, 3)
    assert repr(first) == noted[0]
    again = layer_search.search_layers(*split, TOKENS, 1, start=first)
    assert again == whole


@pytest.mark.full
def test_more_layers_that_go_need_no_more_programs(split):
    with compiled() as durations:
        layer_search.search_layers(*split, TOKENS, 3, batch=3)
    once = len(durations)
    with compiled() as durations:
        layer_search.search_layers(*split, TOKENS, 1, batch=3)
    assert len(durations) == once


def test_all_layers_may_stay(split):
    assert layer_search.search_layers(*split, TOKENS, 4) == ([0, 1, 2, 3], [], [])


@pytest.mark.parametrize("layers", [0, 5])
def test_an_impossible_number_of_layers_is_refused(split, layers):
    with pytest.raises(ValueError, match=f"between 1 and 4, got {layers}"):
        layer_search.search_layers(*split, TOKENS, layers)


def test_a_model_that_predicts_nothing_is_refused(split):
    graphdef, params = split
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    with pytest.raises(ValueError, match=r"must be finite.*look at its weights"):
        layer_search.search_layers(graphdef, broken, TOKENS, 3)
