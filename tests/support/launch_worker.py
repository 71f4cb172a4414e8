"""What each of two processes gets from `processes`, and what is built on it."""

import errno
import json

import jax

from jaxprune.arrays import processes


def attempt(call, function):
    try:
        return call(function)
    except Exception as error:
        return [type(error).__name__, getattr(error, "errno", None), str(error)]


def fail():
    raise OSError(errno.ENOSPC, "full")


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def odd():
    raise Odd("one", "two")


def only(who):
    def act():
        if jax.process_index() == who:
            raise ValueError("mine")
        return "fine"

    return act


def main(port, number, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    said = {
        "told": processes.on_first(lambda: [jax.process_index(), "x" * 5000]),
        "raised": attempt(processes.on_first, fail),
        "odd": attempt(processes.on_first, odd),
        "first alone fails": attempt(processes.together, only(0)),
        "second alone fails": attempt(processes.together, only(1)),
        "all succeed": processes.together(jax.process_index),
    }
    (folder / f"said-{number}.json").write_text(json.dumps(said))
    jax.distributed.shutdown()
