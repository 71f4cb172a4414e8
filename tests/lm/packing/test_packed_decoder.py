"""A packed decoder gives what the decoder gives, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.checkpoints import compact
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.models.generate import generate
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.packing.packed_decoder import pack_decoder
from tests.support import tiny_families, tiny_hf
from tests.support.zeroed import write_zeros

TOKENS = jnp.asarray(tiny_hf.tokens(2, 12))


def opened(path, **options):
    """The packed model of a directory or of a compact file."""
    with open_source(path) as source:
        return pack_decoder(open_model(source, **options), source)


@nnx.jit
def packed_logits(decoder, tokens):
    states, _ = decoder.states(decoder.embed(tokens))
    return decoder.logits(states)


@pytest.mark.full
@pytest.mark.parametrize("name", [*tiny_hf.CONFIGS, *tiny_families.MIXTURES])
def test_a_packed_decoder_gives_the_logits_of_the_decoder(name, tmp_path):
    folder, file = tmp_path / "model", tmp_path / "model.jaxprune"
    # Loops over experts take long to compile.
    layers = 1 if name in tiny_families.MIXTURES else None
    tiny_hf.random_folder(name, folder, layers=layers)
    write_zeros(folder, 0.6)
    compact.compact(open_directory(folder), file)
    packed = opened(file)
    dense = open_model(folder).read().decoder()
    expected = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(dense, TOKENS))
    logits = packed_logits(packed.decoder, TOKENS)
    np.testing.assert_allclose(
        logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
    # Every matrix is packed; the gains of norms of heads have two axes and are none.
    rows = packed.report["weights"]
    reasons = {leaf: row["reason"] for leaf, row in rows.items() if not row["packed"]}
    assert set(reasons.values()) <= {"has less than two axes", "is an operand of mul"}
    assert all(
        "/norm_" in leaf for leaf in reasons if reasons[leaf] == "is an operand of mul"
    )
    assert packed.report["after"] < packed.report["before"]
    # Token by token with a cache.
    options = {"steps": 4, "key": jax.random.key(0), "temperature": 0.0}
    np.testing.assert_array_equal(
        generate(packed.decoder, TOKENS, **options), generate(dense, TOKENS, **options)
    )
