"""MaxText's own loop (`.[clients]`) prunes to 2:4 and tracks, then holds the zeros."""

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
OUTPUT = tempfile.mkdtemp()
SETTINGS = f"""
    base_output_directory={OUTPUT} checkpoint_period=4 async_checkpointing=false
    dataset_type=synthetic hardware=cpu skip_jax_distributed_system=true
    attention=dot_product decoder_block=llama2 base_emb_dim=16 base_mlp_dim=32
    base_num_query_heads=4 base_num_kv_heads=2 head_dim=8 base_num_decoder_layers=2
    vocab_size=32 max_target_length=8 per_device_batch_size=1
""".split()
plain = optimizers.get_optimizer


def gradual(tx, model, config):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.zeros((1, config.max_target_length), jnp.int32)

    def logits(params, batch):
        rest, tokens = batch
        return nnx.merge(graphdef, params, rest)(tokens, tokens, enable_dropout=False)

    with nnx.logical_axis_rules(config.logical_axis_rules):
        axes = jp.trace(logits, params, (rest, tokens)).axes()
    return jp.gradual(tx, {2: "2:4"}, axes=axes)


def run(name, steps, wrap, *settings):
    def wrapped(config, schedule, model=None, **options):
        tx = wrap(plain(config, schedule, model, **options), model, config)
        return optax.chain(tx, jp.track_importance())

    optimizers.get_optimizer = wrapped
    settings = *SETTINGS, *settings, f"run_name={name}", f"steps={steps}"
    state = train.train_loop(*train.initialize(["", BASE, *settings]))
    params = nnx.filter_state(state["model"], nnx.Param)
    masks = jp.masks.get(state["optimizer"], params)
    tracker = state["optimizer"]["opt_state"][1]
    print(steps, jp.sparsity(params, masks).total, tracker["step"][...])
    return masks


for steps in (5, 8):  # the second run begins at step 5
    masks = run("pruned", steps, gradual)
pruned = f"load_parameters_path={OUTPUT}/pruned/checkpoints/7/items"
for steps in (5, 8):
    run("held", steps, lambda tx, *_: jp.keep_masks(tx, masks), pruned)
