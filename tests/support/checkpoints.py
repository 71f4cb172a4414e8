"""A small state and its checkpoints."""

import os
import signal
import threading

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
    checkpoint.save(folder, small_state(value), step=step, configuration=CONFIGURATION)


def newest(folder):
    """The step of the newest checkpoint, by the names that orbax gives whole ones."""
    names = os.listdir(folder) if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(folder, moment):
    """Saves step after step, and kills this process in one of the saves."""
    state = {str(n): jnp.full((64, 64), float(n)) for n in range(40)}
    checkpoint.save(folder, state, step=1, configuration={})
    if moment == "commit":
        os.rename = os.replace = die
    else:
        threading.Timer(float(moment), die).start()
    for step in range(2, 1000):
        checkpoint.save(folder, state, step=step, configuration={})
