"""MaxText's own models of a checkpoint: the same logits, loss, and the way back."""

import contextlib
import itertools
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

import jaxprune as jp
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.export.maxtext_checkpoint import export_maxtext
from jaxprune.lm.export.trained_weights import save_from_maxtext
from tests.support import tiny_hf
from tests.support.tiny_cli import logits, nats
from tests.support.trainer_folders import CHANGES, handed_folder

maxtext = pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from maxtext.configs import pyconfig  # noqa: E402
from maxtext.input_pipeline import input_pipeline_interface, tokenizer  # noqa: E402
from maxtext.optimizers import optimizers  # noqa: E402
from maxtext.trainers.post_train.distillation import (  # noqa: E402
    distillation_utils,
    train_distill,
)
from maxtext.utils import maxtext_utils, model_creation_utils  # noqa: E402

TOKENS = tiny_hf.tokens(8, 25)
# What a run says beside the model.
RUN = {
    "run_name": "test",
    "enable_checkpointing": False,
    "per_device_batch_size": 1,
    "max_target_length": TOKENS.shape[1] - 1,
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "attention": "dot_product",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "hardware": "cpu",
}
# Five steps on the text alone, without a warm-up.
DISTILLATION = {
    "steps": 5,
    "distill_alpha": 0.0,
    "eval_interval": 0,
    "learning_rate": 1e-3,
    "warmup_steps_fraction": 0.0,
    "save_checkpoint_on_completion": False,
}


@pytest.fixture(autouse=True)
def their_layers_add_vectors_to_batches_as_numpy_does():
    with jax.numpy_rank_promotion("allow"):
        yield


def read_config(overrides, folder, **settings):
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    output = {"base_output_directory": str(folder / "out")}
    return pyconfig.initialize(["", base], **overrides, **RUN, **output, **settings)


@contextlib.contextmanager
def model_of(config):
    devices = maxtext_utils.create_device_mesh(config, jax.devices())
    mesh = jax.sharding.Mesh(devices, config.mesh_axes)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(config.logical_axis_rules):
        yield model_creation_utils.from_pretrained(config, mesh=mesh)


@pytest.mark.parametrize("name", CHANGES)
def test_its_logits_are_those_of_the_directory(name, tmp_path):
    folder, tokens = handed_folder(name, tmp_path / "model"), TOKENS[:, :-1]
    result = export_maxtext(folder, tmp_path / "student")
    text = (tmp_path / "student" / "student.yml").read_text()
    overrides = yaml.safe_load(text)["student_overrides"]
    assert overrides == result.overrides
    with model_of(read_config(overrides, tmp_path)) as model:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        segments = jnp.ones(tokens.shape, jnp.int32)
        found = model(jnp.asarray(tokens), positions, segments, enable_dropout=False)
    # A Gemma 3's embedding is rounded again, times sqrt(width) of eight bits.
    tolerance = 2e-2 if name == "gemma3" else 1e-4
    expected = logits(folder, tokens)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def batches(*_, **__):
    """As many batches of the tokens as steps: the loop ends with them."""
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    positions = np.broadcast_to(np.arange(inputs.shape[1])[None], inputs.shape)
    ones = np.ones_like(inputs)
    batch = {"inputs": inputs, "targets": targets}
    for part in batch.copy():
        batch |= {f"{part}_position": positions, f"{part}_segmentation": ones}
    return itertools.repeat(batch, DISTILLATION["steps"]), None


@pytest.mark.parametrize("name", CHANGES)
def test_distillation_begins_at_the_directorys_loss_and_comes_back(
    name, tmp_path, monkeypatch
):
    folder = handed_folder(name, tmp_path / "model")
    result = export_maxtext(folder, tmp_path / "student")
    config = read_config(result.overrides, tmp_path, **DISTILLATION)
    with model_of(config) as model:
        params = nnx.state(model, nnx.Param)
        masks = jp.masks.above(jp.scores.magnitude(params), 0.0)
    pruned = jp.sparsity(params, masks)
    assert pruned.zeros > 0
    plain, trainers, losses = optimizers.get_optimizer, [], []

    class Trainer(train_distill.MaxTextDistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

        def _post_process_train_step(self, aux):
            nats_sum, tokens = aux["distill/hard_loss"]
            losses.append(float(nats_sum) / float(tokens))

    def holding_zeros(*args, **kwargs):
        return jp.keep_masks(plain(*args, **kwargs), masks)

    monkeypatch.setattr(optimizers, "get_optimizer", holding_zeros)
    monkeypatch.setattr(train_distill, "MaxTextDistillationTrainer", Trainer)
    # No tokenizer, and tokens instead of a data set; without its id 0 were padding.
    padding = SimpleNamespace(pad_id=-1)
    monkeypatch.setattr(tokenizer, "build_tokenizer", lambda **_: padding)
    monkeypatch.setattr(input_pipeline_interface, "create_data_iterator", batches)
    # What it asks its base class for, Tunix 0.1.7 does not have: so no checkpoints.
    manager = distillation_utils.MaxTextCheckpointManager
    monkeypatch.setattr(manager, "_checkpointer", None, raising=False)
    train_distill.train_distill(config, config)
    assert losses[0] == pytest.approx(nats(folder, TOKENS).mean(), abs=1e-3)
    assert losses[4] < losses[0]
    trained = nnx.state(trainers[0].model.student_model, nnx.Param)
    assert jp.sparsity(trained, masks) == pruned
    save_from_maxtext(trained, folder, tmp_path / "trained")
    record = rewrite.read_provenance(tmp_path / "trained")
    zeros = sum(count["zeros"] for count in record["tensors"].values())
    assert zeros == pruned.zeros
    assert nats(tmp_path / "trained", TOKENS).mean() < losses[0]
