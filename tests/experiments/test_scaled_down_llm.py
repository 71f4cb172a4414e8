"""The main job, killed and started again, ends with the bits of an undisturbed run."""

import json
import signal
import time

import pytest

from tests.support import forked, tiny_job
from tests.support.tiny_run import (
    BATCH,
    CELLS,
    CONTEXT,
    STEPS,
    files,
    flags,
    metrics,
    undisturbed,
)


@pytest.fixture(scope="module")
def run():
    return undisturbed()


def numbers(folder):
    """What must not depend on when and how often a run was interrupted."""
    results = json.loads((folder / "results.json").read_text())
    del results["finished"], results["command"]  # the time, and the folder's name
    results["phases"] = [(phase["name"], phase["seed"]) for phase in results["phases"]]
    return results


def start(arguments, log):
    return forked.start(tiny_job.main, *arguments, log=log)


def kill_when(ready, arguments, log):
    """Starts the process and kills it as soon as `ready()`; its return code."""
    process = start(arguments, log)
    try:
        while process.exitcode is None and not ready():
            time.sleep(0.002)
    finally:
        process.kill()
    return forked.code(process)


@pytest.mark.full
def test_killed_at_any_stage_and_started_again_it_ends_with_the_same_bits(
    run, tmp_path
):
    out, log = tmp_path / "killed", tmp_path / "log"
    arguments = flags(run.text, out)
    for moment in (
        "config.json",  # nothing is done yet
        "seed-0/train/4",  # while it trains
        "seed-0/control.json",  # while it prunes
        "seed-1/retrain/preconditioned_magnitude-global-0.9/4",
    ):
        assert not (out / moment).exists(), f"{moment} was there too early"
        code = kill_when((out / moment).exists, arguments, log)
        assert code == -signal.SIGKILL, log.read_text()
        assert (out / moment).exists()
        assert not (out / "results.json").exists()
    assert forked.code(start(arguments, log)) == 0, log.read_text()
    assert f"report: {out / 'report.html'}" in log.read_text()
    assert numbers(out) == numbers(run.out)
    assert metrics(out) == metrics(run.out)
    assert files(out) == files(run.out)
    # The rate is of the steps that the last process did, as the seconds are.
    trained = json.loads((out / "seed-0" / "train.json").read_text())["phase"]
    assert trained["tokens_per_second"] * trained["seconds"] < (
        (STEPS - 3) * BATCH * CONTEXT
    )


@pytest.mark.slow
def test_killed_whenever_it_wrote_a_file_it_ends_with_the_same_bits(run, tmp_path):
    out, log, kills = tmp_path / "killed", tmp_path / "log", 0
    while True:
        before = stages(out)
        code = kill_when(
            lambda done=before: stages(out) - done, flags(run.text, out), log
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        kills += 1
    assert kills > 2 * (STEPS // 4 + len(CELLS))
    assert numbers(out) == numbers(run.out)
    assert metrics(out) == metrics(run.out)


def stages(out):
    """What tells how far a run has come: stages' results and whole checkpoints."""
    if not out.exists():
        return set()
    steps = [path for path in out.glob("seed-*/**/*") if path.name.isdecimal()]
    return {*out.glob("*.json"), *out.glob("seed-*/**/*.json"), *steps} - {
        *out.glob("seed-*/**/*.orbax-checkpoint-tmp*/**")
    }
