"""Sharded parameters are tracked, pruned and retrained where they lie."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp

mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
rows = jax.NamedSharding(mesh, jax.P("fsdp"))
keys = jax.random.split(jax.random.key(0), 3)
params = {
    "up": jax.device_put(jax.random.normal(keys[0], (64, 256)) / 8, rows),
    "down": jax.device_put(jax.random.normal(keys[1], (256, 64)) / 16, rows),
}
x = jax.random.normal(keys[2], (128, 64))


def loss(params):
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - x) ** 2)


def train(tx, params, steps):
    state = tx.init(params)  # outside of jit, where moments lie as the parameters do

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        # Devices that are threads of one CPU may starve each other: one step at a time.
        params, state = jax.block_until_ready(step(params, state))
    return params, state


tx = optax.chain(jp.track_gradients(storage="int8"), optax.adamw(1e-2))
params, state = train(tx, params, 50)
print(f"dense      loss {loss(params):.4f}")

scores = jp.scores.preconditioned_magnitude(params, state)
masks = jp.masks.make(scores, sparsity=0.5, allocation="global")
params = jp.masks.apply(params, masks)
print(f"pruned     loss {loss(params):.4f}")

params, _ = train(jp.keep_masks(optax.adamw(1e-3), masks), params, 50)
print(f"retrained  loss {loss(params):.4f}, {jp.sparsity(params).total:.0%} zero")
print(
    "up lies as", params["up"].sharding.spec, "- its mask as", masks["up"].sharding.spec
)
