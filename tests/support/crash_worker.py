"""One of two processes that train, prune and retrain as one run, and may be killed.

Process `who` kills itself with SIGKILL at the `moment`: "step" (while it trains),
"retrain" (while it retrains), "prune" (the other one is pruning), or in the second save
of this start: "arrays:BYTES" (that much of the arrays is written), "rename" (orbax is
about to name it). What the run ends with is in `folder`/numbers-NUMBER.json.
"""

import json
import os
import signal
import threading
from pathlib import Path

import jax

HEARTBEAT = 10
"""Seconds after which a process that went silent ends the others."""


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step, batches):
    def deadly(number):
        return die() if number == step else batches(number)

    return deadly


def die_in_save(moment, written):
    """Lays what kills this process in its second save."""
    from orbax.checkpoint import v1 as ocp

    save, saves = ocp.training.Checkpointer.save, []
    rename = os.rename

    def last_rename(source, target, **named):
        if Path(target).name.isdecimal():
            die()
        rename(source, target, **named)

    def watched(checkpointer, step, *arguments, **named):
        saves.append(step)
        if len(saves) == 2 and moment == "arrays":
            folder = Path(str(checkpointer.directory))
            limits = (folder, size(folder) + int(written))
            threading.Thread(target=watch, args=limits, daemon=True).start()
        elif len(saves) == 2:
            os.rename = os.replace = last_rename
        return save(checkpointer, step, *arguments, **named)

    ocp.training.Checkpointer.save = watched


def watch(folder, least):
    """Kills this process as soon as this many bytes lie in the folder."""
    while size(folder) < least:
        pass
    die()


def size(folder):
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(place, name))
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def keep_what_each_compiles():
    """JAX lets the first of several processes alone write what it has compiled.

    The second one would compile everything again at every start.
    """
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def written(*arguments, **named):
        own, state.process_id = state.process_id, 0
        try:
            write(*arguments, **named)
        finally:
            state.process_id = own

    compiler._cache_write = written


def main(port, number, folder, mesh, who=None, moment=""):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        2,
        number,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    keep_what_each_compiles()
    from experiments.harness import device_mesh
    from tests.support import tiny_gpt

    moment, _, written = moment.partition(":")
    named = {}
    if who == number and moment == "step":
        named["batches"] = die_at(5, tiny_gpt.BATCHES)
    elif who == number and moment == "retrain":
        named["retrain_batches"] = die_at(3, tiny_gpt.BATCHES)
    elif who == number and moment == "prune":
        named["before_prune"] = die
    elif who == number:
        die_in_save(moment, written)
    place = device_mesh.make_mesh(mesh, tiny_gpt.BATCHES.batch_size)
    result = tiny_gpt.run(place, folder, **named)
    numbers = {
        "loss": result.losses[-1],
        "trained": tiny_gpt.digest(result.trained),
        "importance": tiny_gpt.digest(result.importance),
        "masks": tiny_gpt.digest(result.masks),
        "retrained": tiny_gpt.digest(result.retrained),
    }
    (folder / f"numbers-{number}.json").write_text(json.dumps(numbers))
    jax.distributed.shutdown()
