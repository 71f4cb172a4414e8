"""Tunix's own models and trainers read a pruned or shrunk directory as it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.lm import cli
from jaxprune.lm.models import hf
from tests.support import tiny_hf
from tests.support.tiny_cli import logits

pytest.importorskip("tunix")
# Their layers add vectors to batches as NumPy does.
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.models.llama3 import params as llama3_params  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402
from tunix.models.qwen3 import params as qwen3_params  # noqa: E402
from tunix.sft import utils  # noqa: E402

TOKENS = tiny_hf.tokens(2, 24)
MODULES = {"llama": (llama3, llama3_params), "qwen3": (qwen3, qwen3_params)}
TIED = {"llama": "weight_tying", "qwen3": "use_tied_embedding"}
# The only base that Tunix has for them.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.mark.parametrize("family", MODULES)
def test_tunix_reads_a_shrunk_directory_with_the_same_logits(family, tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    tiny_hf.random_folder(family, dense, **PLAIN)
    halves = ("--ffn", "0.5", "--heads", "0.5")
    assert cli.main(["shrink", str(dense), str(small), *halves]) == 0
    config = hf.load(small, lazy=True).config
    model, loader = MODULES[family]
    sizes = model.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab_size,
        embed_dim=config.width,
        hidden_dim=config.mlp_width,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=1_000_000,
        norm_eps=config.norm_epsilon,
        **{TIED[family]: config.tie_weights},
    )
    read = loader.create_model_from_safe_tensors(str(small), sizes)
    mask = jnp.ones(TOKENS.shape, bool)
    with jax.numpy_rank_promotion("allow"):
        found = read(
            jnp.asarray(TOKENS),
            utils.build_positions_from_mask(mask),
            None,
            utils.make_causal_attn_mask(mask),
        )[0]
    np.testing.assert_allclose(found, logits(small, TOKENS), rtol=1e-4, atol=1e-4)
