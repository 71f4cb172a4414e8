"""The command in processes of its own, forked from one that has imported everything."""

import multiprocessing
import os
import signal
import sys
import threading
import time

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["jaxprune.cli", "tokenizers"])


def _run(words, log, compiled):
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    import jax
    import tqdm

    from jaxprune import cli

    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    tqdm.tqdm.set_lock(threading.RLock())  # its usual one outlives a killed process
    code = cli.main([str(word) for word in words])
    sys.stdout.flush()
    os._exit(code)


def start(words, log, compiled):
    """Starts the command; its output goes behind what is in the file.

    What was compiled by one start with the folder `compiled`, the next one need not.
    """
    arguments = (list(words), str(log), compiled)
    process = _CONTEXT.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def finish(process, seconds=300):
    """Its exit code; -9 where it was killed."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the command hangs")
    return process.exitcode


def kill_when(process, happened):
    """Kills it at once when something happened; whether it was still running."""
    while process.is_alive():
        if happened():
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.join()
    return process.exitcode == -signal.SIGKILL
