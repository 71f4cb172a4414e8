"""Train a small classifier, watch its weights, prune 60 % of them, retrain."""

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp

# Four spirals in the plane: points (512, 2) and their arm, 0 to 3.
radius = jnp.tile(jnp.linspace(0.1, 1.0, 128), 4)
arm = jnp.repeat(jnp.arange(4), 128)
angle = 4 * radius + arm * jnp.pi / 2
points = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=1)


def logits(params, x):
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    h = jnp.tanh(h @ params["second"]["kernel"] + params["second"]["bias"][None])
    return h @ params["head"]["kernel"]


def loss(params):
    wrong = optax.softmax_cross_entropy_with_integer_labels
    return wrong(logits(params, points), arm).mean()


def train(tx, params, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])(start)


keys = jax.random.split(jax.random.key(0), 3)
params = {
    "first": {"kernel": jax.random.normal(keys[0], (2, 64)), "bias": jnp.zeros(64)},
    "second": {
        "kernel": jax.random.normal(keys[1], (64, 64)) / 8,
        "bias": jnp.zeros(64),
    },
    "head": {"kernel": jax.random.normal(keys[2], (64, 4)) / 8},
}
params, state = train(
    optax.chain(optax.adamw(1e-2), jp.track_importance()), params, 500
)
print(f"dense:     loss {loss(params):.4f}")

scores = jp.scores.preconditioned_magnitude(params, jp.get_importance(state))
masks = jp.masks.make(scores, sparsity=0.6, allocation="global")
params = jp.masks.apply(params, masks)
print(f"pruned:    loss {loss(params):.4f}")

params, _ = train(jp.keep_masks(optax.adamw(3e-3), masks), params, 500)
print(f"retrained: loss {loss(params):.4f}")
print(jp.sparsity(params))
