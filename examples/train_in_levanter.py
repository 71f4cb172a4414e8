"""Levanter's own trainer prunes to 2:4, and goes on from its checkpoint with the zeros.

Run it after pip install '.[levanter]': python examples/train_in_levanter.py
"""

import functools
import tempfile

import equinox as eqx
import haliax as hax
import jax
from levanter.checkpoint import CheckpointerConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.optim import AdamConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

import jaxprune as jp

CONFIG = LlamaConfig(
    seq_len=8, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=4,
    num_kv_heads=2,
)  # fmt: skip
BATCH, VOCAB = hax.Axis("batch", 8), hax.Axis("vocab", 32)
TOKENS = hax.random.randint(jax.random.key(1), (BATCH, CONFIG.Pos), 0, 32)
EXAMPLE = hax.vmap(LmExample.causal, BATCH)(TOKENS)
CHECKPOINTS = CheckpointerConfig(tempfile.mkdtemp())
fresh_model = functools.partial(CONFIG.build, VOCAB, key=jax.random.PRNGKey(0))


def loss(model, example, *, key=None):
    # Its own mean has a mask of floats, which JAX refuses.
    nats = compute_next_token_loss(model, example, reduction=None, reduction_axis=())
    return hax.mean(nats).scalar()


def train(steps):
    config = TrainerConfig(
        id="pruned", num_train_steps=steps, train_batch_size=BATCH.size,
        checkpointer=CHECKPOINTS, tracker=NoopConfig(), require_accelerator=False,
    )  # fmt: skip
    tx = jp.gradual(AdamConfig().build(steps), {2: "2:4"}, axes=axes)
    with Trainer(config, tx, loss, add_default_hooks=False) as trainer:
        state = trainer.initial_state(jax.random.PRNGKey(2), model_init=fresh_model)
        info = trainer.train(state, [EXAMPLE] * steps)
        checkpointer = CHECKPOINTS.create("pruned")
        checkpointer.on_step(info, force=True)
        checkpointer.wait_until_finished()
    return info.state


params, static = eqx.partition(fresh_model(), eqx.is_inexact_array)
axes = jp.trace(lambda p, x: eqx.combine(p, static)(x), params, TOKENS).axes()
for steps in (5, 8):  # the second trainer begins at step 5
    state = train(steps)
    params = eqx.filter(state.model, eqx.is_inexact_array)
    masks = jp.masks.get(state.opt_state, params)
    print(int(state.step), jp.sparsity(params, masks).total)
