"""Levanter's trainer (`.[levanter]`) prunes to 2:4 and tracks, then holds the zeros."""

import tempfile

import equinox as eqx
import haliax as hax
import jax
import optax
from levanter.checkpoint import CheckpointerConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.optim import AdamConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

import jaxprune as jp

CONFIG = LlamaConfig(
    8, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=4, num_kv_heads=2
)
BATCH, VOCAB = hax.Axis("batch", 8), hax.Axis("vocab", 32)
TOKENS = hax.random.randint(jax.random.key(1), (BATCH, CONFIG.Pos), 0, 32)
EXAMPLE = hax.vmap(LmExample.causal, BATCH)(TOKENS)
CHECKPOINTS = CheckpointerConfig(tempfile.mkdtemp())
FRESH = CONFIG.build(VOCAB, key=jax.random.PRNGKey(0))


def loss(model, example, *, key=None):
    # Its own mean has a mask of floats, which JAX refuses.
    nats = compute_next_token_loss(model, example, reduction=None, reduction_axis=())
    return hax.mean(nats).scalar()


def train(run, steps, tx, model=FRESH):
    config = TrainerConfig(
        id=run, num_train_steps=steps, train_batch_size=8, checkpointer=CHECKPOINTS,
        tracker=NoopConfig(), require_accelerator=False)  # fmt: skip
    tx = optax.chain(tx, jp.track_importance())
    with Trainer(config, tx, loss, add_default_hooks=False) as trainer:
        state = trainer.initial_state(jax.random.PRNGKey(2), model_init=lambda: model)
        info = trainer.train(state, [EXAMPLE] * steps)
        checkpointer = CHECKPOINTS.create(run)
        checkpointer.on_step(info, force=True)
        checkpointer.wait_until_finished()
    params = eqx.filter(info.model, eqx.is_inexact_array)
    masks = jp.masks.get(info.opt_state, params)
    split = not any(mask.is_fully_replicated for mask in jax.tree.leaves(masks))
    assert split == (jax.device_count() > 1)
    print(info.next_step, jp.sparsity(params, masks).total, info.opt_state[1].step)
    return info.model, masks


params, static = eqx.partition(FRESH, eqx.is_inexact_array)
axes = jp.trace(lambda p, x: eqx.combine(p, static)(x), params, TOKENS).axes()
adam = AdamConfig().build(8)
for steps in (5, 8):  # the second trainer begins at step 5
    model, masks = train("pruned", steps, jp.gradual(adam, {2: "2:4"}, axes=axes))
for steps in (5, 8):
    train("held", steps, jp.keep_masks(adam, masks), model)
