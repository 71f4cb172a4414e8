"""MaxText's own loop prunes to 2:4, and goes on from its checkpoint with the zeros.

Run it after pip install '.[clients]': python examples/train_in_maxtext.py
"""

import os
import tempfile

import jax.numpy as jnp
import maxtext
import optax
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import jaxprune as jp

BASE = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
SETTINGS = f"""
    base_output_directory={tempfile.mkdtemp()} run_name=pruned checkpoint_period=4
    async_checkpointing=false dataset_type=synthetic hardware=cpu
    skip_jax_distributed_system=true attention=dot_product decoder_block=llama2
    base_emb_dim=16 base_mlp_dim=32 base_num_query_heads=4 base_num_kv_heads=2
    head_dim=8 base_num_decoder_layers=2 vocab_size=32 max_target_length=8
    per_device_batch_size=1
""".split()
plain = optimizers.get_optimizer


def input_axes(model, config):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.zeros((1, config.max_target_length), jnp.int32)

    def logits(params, batch):
        rest, tokens = batch
        return nnx.merge(graphdef, params, rest)(tokens, tokens, enable_dropout=False)

    with nnx.logical_axis_rules(config.logical_axis_rules):
        return jp.trace(logits, params, (rest, tokens)).axes()


def pruning_optimizer(config, schedule, model=None, **options):
    tx = plain(config, schedule, model, **options)
    tx = jp.gradual(tx, {2: "2:4"}, axes=input_axes(model, config))
    return optax.chain(tx, jp.track_importance())


def run(steps):
    return train.train_loop(*train.initialize(["", BASE, *SETTINGS, f"steps={steps}"]))


optimizers.get_optimizer = pruning_optimizer
for steps in (5, 8):  # the second run begins at step 5
    state = run(steps)
    params = nnx.filter_state(state["model"], nnx.Param)
    masks = jp.masks.get(state["optimizer"], params)
    scores = jp.scores.averaged_weight(params, state["optimizer"])  # of the tracker
    print(steps, jp.sparsity(params, masks).total, jp.sparsity(scores, masks).total)
