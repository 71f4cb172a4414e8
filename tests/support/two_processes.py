"""Two processes that are one run, as a launcher such as Slurm starts them."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.xla_flags import xla_flags

ROOT = Path(__file__).resolve().parents[2]
JOINED = ["--distributed"]


@contextlib.contextmanager
def started(arguments, folder, devices=1):
    """Both of them, running."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        # As many threads as where one process has all devices: XLA sums up the large
        # products of a CPU in an order that depends on it.
        "NPROC": str(2 * devices),
    }
    both = []
    for number in "01":
        told = {  # what Slurm tells
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": number,
            "SLURM_LOCALID": number,
        }
        with open(folder / f"log-{number}", "wb") as log:
            command = [sys.executable, *map(str, arguments)]
            both.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment | told, stdout=log, stderr=log
                )
            )
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.wait()


def two(arguments, folder, devices=1):
    """What both said, once they are done."""
    with started(arguments, folder, devices) as both:
        codes = [process.wait(400) for process in both]
    logs = [(folder / f"log-{n}").read_text(errors="replace") for n in "01"]
    assert codes == [0, 0], "\n".join(logs)
    return logs
