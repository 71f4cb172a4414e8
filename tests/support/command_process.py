"""The command in processes of its own, forked from one that has imported everything."""

import multiprocessing
import os
import signal
import sys
import threading
import time

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["jaxprune.lm.cli", "tokenizers"])


def _run(words, log):
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    import tqdm

    from jaxprune.lm import cli

    tqdm.tqdm.set_lock(threading.RLock())  # its usual one outlives a killed process
    code = cli.main([str(word) for word in words])
    sys.stdout.flush()
    os._exit(code)


def start(words, log):
    """Starts the command; its output goes behind what is in the file."""
    process = _CONTEXT.Process(target=_run, args=(list(words), str(log)), daemon=True)
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
