"""MaxText's own models of a checkpoint that is written for it: the same logits."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from jaxprune.lm.export.maxtext_checkpoint import export_maxtext
from tests.support import tiny_hf
from tests.support.tiny_cli import logits, nats
from tests.support.trainer_folders import CHANGES, pruned_folder

maxtext = pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from maxtext.configs import pyconfig  # noqa: E402
from maxtext.utils import maxtext_utils, model_creation_utils  # noqa: E402

TOKENS = tiny_hf.tokens(8, 24)
# What a run says beside the model.
RUN = {
    "run_name": "test",
    "enable_checkpointing": False,
    "per_device_batch_size": 1,
    "max_target_length": TOKENS.shape[1],
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "attention": "dot_product",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "hardware": "cpu",
}


@pytest.mark.parametrize("name", CHANGES)
def test_its_logits_are_those_of_the_directory(name, tmp_path):
    folder = pruned_folder(name, tmp_path / "model")
    result = export_maxtext(folder, tmp_path / "student")
    text = (tmp_path / "student" / "student.yml").read_text()
    overrides = yaml.safe_load(text)["student_overrides"]
    assert overrides == result.overrides
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    output = {"base_output_directory": str(tmp_path / "out")}
    with jax.numpy_rank_promotion("allow"):
        config = pyconfig.initialize(["", base], **overrides, **RUN, **output)
        devices = maxtext_utils.create_device_mesh(config, jax.devices())
        mesh = jax.sharding.Mesh(devices, config.mesh_axes)
        with jax.set_mesh(mesh), nnx.logical_axis_rules(config.logical_axis_rules):
            model = model_creation_utils.from_pretrained(config, mesh=mesh)
            positions = jnp.broadcast_to(
                jnp.arange(TOKENS.shape[1])[None], TOKENS.shape
            )
            segments = jnp.ones(TOKENS.shape, jnp.int32)
            found = model(
                jnp.asarray(TOKENS), positions, segments, enable_dropout=False
            )
    # A Gemma 3's embedding is rounded again, times sqrt(width) of eight bits.
    tolerance = 2e-2 if name == "gemma3" else 1e-4
    expected = logits(folder, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    loss = optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], TOKENS[:, 1:])
    assert loss.mean() == pytest.approx(nats(folder, TOKENS).mean(), abs=1e-3)
