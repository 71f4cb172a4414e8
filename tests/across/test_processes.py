"""Two processes with four devices each compute the bits of one process with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import free_port
from tests.support.xla_flags import xla_flags

WORKER = Path(__file__).parents[1] / "support" / "process_worker.py"
PROCESSES, DEVICES = 2, 4
# Whole processes, three of them, which train, rank and prune.
pytestmark = pytest.mark.full

SECONDS = 240  # far more than it takes: a hang must end


def start(folder, name, devices, *arguments):
    """A worker with so many devices; what it says goes to a file."""
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, WORKER, folder / f"{name}.json", *map(str, arguments)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(WORKER.parents[2]),
                "XLA_FLAGS": xla_flags(devices),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the lone process and each of the two wrote, by name."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    running = {"alone": start(folder, "alone", 1)}
    try:
        for rank in range(PROCESSES):
            arguments = (rank, PROCESSES, port)
            running[str(rank)] = start(folder, str(rank), DEVICES, *arguments)
        for name, process in running.items():
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                code = "none: it hangs"
            said = (folder / f"{name}.log").read_text()
            assert code == 0, f"{name} ended with {code}:\n{said[-3000:]}"
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in running}


def test_all_devices_took_part(written):
    counts = {name: run["devices"] for name, run in written.items()}
    assert counts == {"alone": 1, "0": 8, "1": 8}


def test_results_are_of_different_things(written):
    """A digest of nothing, or of the same thing everywhere, would prove nothing."""
    twins = {
        "jitted: unpacked": "jitted: Unstructured() global",
        "eagerly: unpacked": "eagerly: masks",
        "eagerly: scores": "jitted: preconditioned_magnitude",
    }
    for run in written.values():
        for digests in run["digests"].values():
            assert len(set(digests.values())) == len(digests) - len(twins)
            assert all(digests[a] == digests[b] for a, b in twins.items())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_bit_is_that_of_one_device(written, rank):
    (alone,) = written["alone"]["digests"].values()
    spread = written[rank]["digests"]
    different = [
        f"{layout}, {name}"
        for layout, digests in spread.items()
        for name, digest in digests.items()
        if alone[name] != digest
    ]
    assert len(spread) == 2
    assert set().union(*spread.values()) == alone.keys()
    assert different == []
