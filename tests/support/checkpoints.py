"""A small state and its checkpoints."""

import os
import shutil
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
    return checkpoint.save(
        folder, small_state(value), step=step, configuration=CONFIGURATION
    )


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def snapshot(folder):
    return {p: p.read_bytes() for p in files(folder)}


def save_until_killed(folder, moment):
    """Saves step after step, and kills this process in one of the saves."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    state = {str(n): jnp.full((64, 64), float(n)) for n in range(40)}
    checkpoint.save(folder, state, step=1, configuration={})
    if moment == "manifest":
        checkpoint.manifest.write = die
    elif moment == "commit":
        os.rename = os.replace = die
    elif moment == "removal":
        shutil.rmtree = die
    else:
        save_arrays = checkpoint._save_arrays

        def slowly(*arguments):
            threading.Timer(float(moment), die).start()
            save_arrays(*arguments)

        checkpoint._save_arrays = slowly
    for step in range(2, 100):
        checkpoint.save(folder, state, step=step, configuration={}, keep=1)
