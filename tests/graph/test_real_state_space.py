"""A state space layer of MaxText's Qwen3-Next: what is pruned, and why nothing is cut.

`pip install '.[clients]'`. bonsai, which has a Mamba 2, does not install beside us: its
only release is empty, and its repository asks for an older JAX.
"""

import os

import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

maxtext = pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from maxtext.configs import pyconfig  # noqa: E402
from maxtext.models import qwen3  # noqa: E402

SETTINGS = {
    "run_name": "test",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "dtype": "float32",
    "weight_dtype": "float32",
    "decoder_block": "qwen3_next",
    "inhomogeneous_layer_cycle_interval": 4,
    "base_emb_dim": 16,
    "base_num_decoder_layers": 4,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "partial_rotary_factor": 0.25,
    "base_mlp_dim": 32,
    "base_moe_mlp_dim": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "gdn_key_head_dim": 8,
    "gdn_value_head_dim": 8,
    "gdn_num_key_heads": 2,
    "gdn_num_value_heads": 4,
    "gdn_chunk_size": 8,
    "vocab_size": 32,
    "max_target_length": 8,
    "per_device_batch_size": 1,
}
MATRICES = {"in_proj_ba/kernel", "in_proj_qkvz/kernel", "out_proj/kernel"}


@pytest.fixture
def layer(tmp_path):
    """The layer as a function of parameters and a batch, and one of each."""
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    output = str(tmp_path)
    config = pyconfig.initialize(["", base], base_output_directory=output, **SETTINGS)
    axes = config.mesh_axes
    device = np.reshape(jax.devices()[:1], [1] * len(axes))
    mesh = jax.sharding.Mesh(device, axes)
    module = qwen3.Qwen3NextGatedDeltaNet(config, mesh=mesh, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)[0]

    rules = nnx.logical_axis_rules(config.logical_axis_rules)
    with jax.numpy_rank_promotion("allow"), jax.set_mesh(mesh), rules:
        yield fn, params, jax.random.normal(jax.random.key(0), (8, 8, 16))


def test_matrices_are_pruned_the_taps_are_not_and_no_unit_can_be_removed(layer):
    fn, params, x = layer
    rows = {row.name: row for row in jp.trace(fn, params, x).explain()}
    assert {name for name, row in rows.items() if row.pruned} == MATRICES
    assert rows["conv1d/kernel"].why == "one input and few taps"
    result = jp.prune_trained(fn, params, [x], "wanda", sparsity=0.5)
    for name, (zeros, size) in jp.sparsity(result.params).by_leaf.items():
        assert zeros == (size / 2 if name in MATRICES else 0)
    groups = jp.axis_groups(fn, params, x)
    assert not any(group.removable for group in groups)
    heads = next(group for group in groups if group.name.startswith("A_log:"))
    assert heads.why == "is an operand of shard_map, which is not understood"
    assert np.isfinite(fn(result.params, x)).all()
