"""Prune any trained JAX function: traced, calibrated and solved layer by layer."""

import jax
import jax.numpy as jnp

import jaxprune as jp


def model(params, x):
    """Two residual MLP blocks; prune_trained needs no module classes."""
    for block in params["blocks"]:
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
    return x


keys = iter(jax.random.split(jax.random.key(0), 8))
params = {
    "blocks": [
        {
            "up": jax.random.normal(next(keys), (32, 128)) / 6,
            "down": jax.random.normal(next(keys), (128, 32)) / 12,
        }
        for _ in range(2)
    ]
}
# Inputs whose features are correlated, as real activations are.
mix = jax.random.normal(next(keys), (32, 32)) / 6
batches = [jax.random.normal(next(keys), (256, 32)) @ mix for _ in range(2)]
held_out = jax.random.normal(next(keys), (256, 32)) @ mix

print(jp.trace(model, params, batches[0]))  # which weights it sees, and how
dense = model(params, held_out)
for method in ("magnitude", "wanda", "sparsegpt", "alps"):
    pruned = jp.prune_trained(
        model, params, batches, method=method, sparsity=0.5, progress=False
    ).params
    change = jnp.linalg.norm(model(pruned, held_out) - dense) / jnp.linalg.norm(dense)
    print(f"{method:10s} changes the output by {change:.1%}")
