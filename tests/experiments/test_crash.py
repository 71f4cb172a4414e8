"""Of two processes one is killed; the next start ends with the same numbers."""

import json
import os
import signal
import time

import pytest

from experiments.harness import checkpoint, device_mesh
from tests.support import crash_worker, forked, tiny_gpt
from tests.support.checkpoints import newest
from tests.support.crash_worker import HEARTBEAT
from tests.support.xla_flags import xla_flags

MESH = "fsdp=2,model=2"
PATIENCE = HEARTBEAT + 30
"""Seconds for a process to notice that the other one is gone, on a busy machine."""


def start(folder, *death):
    """Runs both processes to their end; their return codes and what they said."""
    folder.mkdir(exist_ok=True)
    port, logs = forked.free_port(), [folder.with_suffix(f".{n}.log") for n in (0, 1)]
    job, two = (crash_worker.main, port), xla_flags(2)
    both = [
        forked.start(*job, number, folder, MESH, *death, log=log, XLA_FLAGS=two)
        for number, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + 300
        while all(process.exitcode is None for process in both):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.02)
        codes = [forked.code(process, PATIENCE) for process in both]
    finally:
        for process in both:
            process.kill()
            process.join()
    return codes, "\n".join(log.read_text(errors="replace") for log in logs)


def killed(folder, who, moment):
    """One process kills itself; the other one ends by itself, with an error."""
    codes, output = start(folder, who, moment)
    assert codes[who] == -signal.SIGKILL, output
    assert codes[1 - who] not in (0, -signal.SIGKILL), output
    assert not list(folder.glob("numbers-*"))


def finished(folder):
    codes, output = start(folder)
    assert codes == [0, 0], output
    first, second = (
        json.loads((folder / f"numbers-{number}.json").read_text()) for number in (0, 1)
    )
    assert first == second
    return first


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return finished(folder), folder


@pytest.mark.full
def test_killed_in_mid_step_mid_prune_and_mid_save_it_ends_with_the_same_numbers(
    undisturbed, tmp_path
):
    folder = tmp_path / "run"
    killed(folder, 0, "step")
    assert newest(folder / "train") == 4
    killed(folder, 1, "prune")
    assert (newest(folder / "train"), newest(folder / "retrain")) == (6, None)
    killed(folder, 0, "rename")
    assert newest(folder / "retrain") == 2
    assert finished(folder) == undisturbed[0]
    assert os.listdir(folder / "retrain") == os.listdir(undisturbed[1] / "retrain")


@pytest.mark.full
def test_what_two_processes_saved_opens_in_one_bit_for_bit(undisturbed):
    numbers, folder = undisturbed
    for mesh in ("data=1", "fsdp=8"):
        place = device_mesh.make_mesh(mesh, tiny_gpt.BATCHES.batch_size)
        state = tiny_gpt.start(place)
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
        (0, "rename"),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_numbers(
    undisturbed, tmp_path, who, moment
):
    folder = tmp_path / "run"
    killed(folder, who, moment)
    saved = {"step": 4, "prune": 6, "retrain": 6}.get(moment, 2)
    assert newest(folder / "train") == saved
    assert finished(folder) == undisturbed[0]
