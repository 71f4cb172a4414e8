"""Of two processes one is killed; the next start ends with the same numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.harness import checkpoint, device_mesh, training
from tests.support import tiny_gpt
from tests.support.crash_worker import HEARTBEAT
from tests.support.xla_flags import xla_flags

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "support" / "crash_worker.py"
MESH = "fsdp=2,model=2"
PATIENCE = HEARTBEAT + 30
"""Seconds for a process to notice that the other one is gone, on a busy machine."""


@pytest.fixture(scope="module")
def environment():
    """Two devices a process."""
    return os.environ | {
        "XLA_FLAGS": xla_flags(2),
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder, environment, *death):
    """Runs both processes to their end; their return codes and what they said."""
    folder.mkdir(exist_ok=True)
    port, logs = free_port(), [folder.with_suffix(f".{n}.log") for n in (0, 1)]
    both = []
    for number, log in enumerate(logs):
        with open(log, "wb") as output:
            command = [
                ROOT / "tests" / "support" / "crash_worker.py",
                port,
                number,
                folder,
                MESH,
                *death,
            ]
            both.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        deadline = time.monotonic() + 300
        while all(process.poll() is None for process in both):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.02)
        codes = [process.wait(PATIENCE) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    return codes, "\n".join(log.read_text(errors="replace") for log in logs)


def killed(folder, environment, who, moment):
    """One process kills itself; the other one ends by itself, with an error."""
    codes, said = start(folder, environment, who, moment)
    assert codes[who] == -signal.SIGKILL, said
    assert codes[1 - who] not in (0, -signal.SIGKILL), said
    assert not list(folder.glob("numbers-*"))


def finished(folder, environment):
    codes, said = start(folder, environment)
    assert codes == [0, 0], said
    first, second = (
        json.loads((folder / f"numbers-{number}.json").read_text()) for number in (0, 1)
    )
    assert first == second
    return first


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return finished(folder, environment), folder


def whole(folder):
    found = checkpoint.latest(folder)
    return found and found.step


@pytest.mark.full
def test_killed_in_mid_step_mid_prune_and_mid_save_it_ends_with_the_same_numbers(
    undisturbed, environment, tmp_path
):
    folder = tmp_path / "run"
    killed(folder, environment, 0, "step")
    assert whole(folder / "train") == 4
    killed(folder, environment, 1, "prune")
    assert (whole(folder / "train"), whole(folder / "retrain")) == (6, None)
    killed(folder, environment, 0, "torn")
    assert (folder / "retrain" / "4" / ".checkpoint.json.partial").exists()
    assert whole(folder / "retrain") == 2
    assert finished(folder, environment) == undisturbed[0]
    assert os.listdir(folder / "retrain") == os.listdir(undisturbed[1] / "retrain")


@pytest.mark.full
def test_what_two_processes_saved_opens_in_one_bit_for_bit(undisturbed):
    numbers, folder = undisturbed
    for mesh in ("data=1", "fsdp=8"):
        place = device_mesh.make_mesh(mesh, tiny_gpt.BATCHES.batch_size)
        state = training.init(tiny_gpt.MODEL.init(0), tiny_gpt.WATCHED, mesh=place)
        opened = checkpoint.restore(folder / "train", state).state
        assert tiny_gpt.digest(opened) == numbers["trained"]


@pytest.mark.slow
def test_two_processes_compute_what_one_device_does(undisturbed):
    alone = tiny_gpt.run(None)
    assert abs(undisturbed[0]["loss"] - alone.losses[-1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "moment"),
    [
        (1, "step"),
        (0, "prune"),
        (0, "retrain"),
        (1, "retrain"),
        *((who, f"arrays:{size}") for who in (0, 1) for size in (0, 1, 5000, 40_000)),
        (0, "manifest"),
        (0, "rename"),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_numbers(
    undisturbed, environment, tmp_path, who, moment
):
    folder = tmp_path / "run"
    killed(folder, environment, who, moment)
    saved = {"step": 4, "prune": 6, "retrain": 6}.get(moment, 2)
    assert whole(folder / "train") == saved
    assert finished(folder, environment) == undisturbed[0]
