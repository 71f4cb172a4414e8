"""Tunix's own models of a directory: the same logits, and trainers that hold zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import tree
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.export.trained_weights import save_from_tunix
from jaxprune.lm.export.tunix_model import load_in_tunix
from tests.support import tiny_hf
from tests.support.tiny_cli import logits, nats
from tests.support.trainer_folders import CHANGES, handed_folder

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")
distillation = pytest.importorskip("tunix.distillation.distillation_trainer")
# Their layers add vectors to batches as NumPy does.
pytestmark = [
    pytest.mark.full,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
]

from tunix.distillation import strategies  # noqa: E402
from tunix.sft import utils  # noqa: E402

TOKENS = tiny_hf.tokens(2, 24)


@pytest.fixture(scope="module", params=CHANGES)
def folder(request, tmp_path_factory):
    return handed_folder(request.param, tmp_path_factory.mktemp("tunix") / "model")


def inputs(tokens):
    mask = jnp.ones(tokens.shape, bool)
    return {
        "input_tokens": jnp.asarray(tokens),
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def forward(model, input_tokens, positions, attention_mask):
    with jax.numpy_rank_promotion("allow"):
        return model(input_tokens, positions, None, attention_mask)[0]


def before_the_last(model, **arrays):
    """Logits of the positions that have a next token."""
    return forward(model, **arrays)[:, :-1]


def test_its_logits_are_those_of_the_directory(folder):
    found = forward(load_in_tunix(folder), **inputs(TOKENS))
    np.testing.assert_allclose(found, logits(folder, TOKENS), rtol=1e-4, atol=1e-4)


def test_distillation_begins_at_the_directorys_loss_and_comes_back(folder, tmp_path):
    student, teacher = load_in_tunix(folder), load_in_tunix(folder)
    params = nnx.state(student, nnx.Param)
    scores = jp.scores.magnitude(params)
    masks = jp.masks.above(scores, 0.0)
    pruned = jp.sparsity(params, masks)
    assert pruned.zeros > 0
    strategy = strategies.LogitStrategy(
        before_the_last,
        before_the_last,
        lambda input_tokens, **_: jax.nn.one_hot(input_tokens[:, 1:], 97),
        alpha=0.0,  # the loss of the text alone
    )
    settings = distillation.TrainingConfig(eval_every_n_steps=100, max_steps=5)
    trainer = distillation.DistillationTrainer(
        student, teacher, strategy, jp.keep_masks(optax.adamw(1e-3), masks), settings
    ).with_gen_model_input_fn(lambda batch: inputs(batch.input_tokens))
    losses = []
    trainer._post_process_train_step = lambda aux: losses.append(
        float(aux["distill/hard_loss"])
    )
    ones = jnp.ones(TOKENS.shape, bool)
    batch = distillation.TrainingInput(jnp.asarray(TOKENS), ones)
    with jax.numpy_rank_promotion("allow"):
        trainer.train([batch] * 5)
    assert losses[0] == pytest.approx(nats(folder, TOKENS).mean(), abs=1e-3)
    assert losses[4] < losses[0]
    trained = nnx.state(trainer.model, nnx.Param)
    assert jp.sparsity(trained, masks) == pruned
    after = jp.tree.named_leaves(trained)
    for name, mask in jp.tree.named_leaves(masks).items():
        if not tree.is_excluded(mask):
            np.testing.assert_array_equal(np.asarray(after[name] == 0), ~mask)
    save_from_tunix(trainer.model, folder, tmp_path / "trained")
    record = rewrite.read_provenance(tmp_path / "trained")
    zeros = sum(count["zeros"] for count in record["tensors"].values())
    assert zeros == pruned.zeros
    found = forward(trainer.model, **inputs(TOKENS))
    expected = logits(tmp_path / "trained", TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
