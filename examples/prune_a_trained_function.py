"""Prune any trained JAX function: traced, calibrated and solved layer by layer."""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxprune as jp

images, labels = load_digits(return_X_y=True)  # (1797, 64), (1797,)
images = jnp.asarray(images, jnp.float32) / 16
train, test = slice(0, 1400), slice(1400, None)


def model(params, x):
    """Two residual MLP blocks and a head; prune_trained needs no module classes."""
    for block in params["blocks"]:
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
    return x @ params["head"]


def loss(params, rows):
    logits = model(params, images[rows])
    wrong = optax.softmax_cross_entropy_with_integer_labels
    return wrong(logits, labels[rows]).mean()


keys = iter(jax.random.split(jax.random.key(0), 5))
params = {
    "blocks": [
        {
            "up": jax.random.normal(next(keys), (64, 128)) / 8,
            "down": jax.random.normal(next(keys), (128, 64)) / 12,
        }
        for _ in range(2)
    ],
    "head": jax.random.normal(next(keys), (64, 10)) / 8,
}
tx = optax.adamw(1e-3)


def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, train), state, params)
    return (optax.apply_updates(params, updates), state), None


params, _ = jax.lax.scan(step, (params, tx.init(params)), length=200)[0]
batches = [images[start : start + 350] for start in range(0, 1400, 350)]
print(jp.trace(model, params, batches[0]))  # which weights it sees, and how

print(f"dense      loss {loss(params, test):.2f}")
for method in ("magnitude", "wanda", "sparsegpt", "alps"):
    pruned = jp.prune_trained(
        model, params, batches, method=method, sparsity=0.8
    ).params
    print(f"{method:10s} loss {loss(pruned, test):.2f}")
