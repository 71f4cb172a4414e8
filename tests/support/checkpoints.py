"""A small state and its checkpoints."""

import jax
import jax.numpy as jnp

from experiments.harness import checkpoint

CONFIGURATION = {"seed": 0, "model": {"layers": (1, 2)}}


def small_state(value=1.0):
    return {
        "params": {"w": jnp.full((3, 4), value), "b": jnp.zeros(4, jnp.bfloat16)},
        "step": jnp.int32(7),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def save(folder, step, value=None):
    value = float(step) if value is None else value
    return checkpoint.save(
        folder, small_state(value), step=step, configuration=CONFIGURATION
    )


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def snapshot(folder):
    return {p: p.read_bytes() for p in files(folder)}
