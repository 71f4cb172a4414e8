"""Several processes make one run: all alike, and one of them looks and writes."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments import scaled_down_llm
from jaxprune.arrays import processes
from tests.support import forked, launch_worker
from tests.support.tiny_run import MODULE, metrics, write_text
from tests.support.two_processes import JOINED, ROOT, two
from tests.support.xla_flags import xla_flags

FLAGS = [
    *("--seeds", "0"),
    *("--criteria", "preconditioned_magnitude", "random"),
    *("--retrain-criteria", "preconditioned_magnitude"),
    *("--sparsities", "0.5", "0.9"),
    *("--retrain-sparsities", "0.9"),
    *("--show-sparsity", "0.9"),
    *("--batch-size", "4"),
    *("--steps", "6"),
    *("--retrain-steps", "2"),
    *("--eval-tokens", "512"),
    *("--sample-length", "8"),
    *("--checkpoint-every", "3"),
]


def test_what_the_cluster_does_not_tell_is_one_sentence(monkeypatch):
    def refuse(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(OSError, match=r"could not be joined \(coord.*srun"):
        processes.join()


def test_processes_with_other_flags_are_refused_by_the_fields():
    with pytest.raises(ValueError, match="same flags, but steps was 5 and is 6"):
        scaled_down_llm._check_alike({"steps": 5}, {"steps": 6})


def test_one_process_alone_is_the_first_and_asks_nobody():
    def fail():
        raise KeyError("mine")

    assert processes.is_first()
    for call in (processes.on_first, processes.together):
        assert call(lambda: 3) == 3
        with pytest.raises(KeyError, match="mine"):
            call(fail)


@pytest.mark.full
def test_two_processes_get_the_answer_or_the_error_of_the_first(tmp_path):
    job, logs = (launch_worker.main, forked.free_port()), [tmp_path / n for n in "01"]
    both = [
        forked.start(*job, number, tmp_path, log=log, XLA_FLAGS=xla_flags(1))
        for number, log in enumerate(logs)
    ]
    for process, log in zip(both, logs, strict=True):
        assert forked.code(process, 400) == 0, log.read_text()
    first, second = (
        json.loads((tmp_path / f"said-{n}.json").read_text()) for n in (0, 1)
    )
    assert first["told"] == second["told"] == [0, "x" * 5000]
    assert first["raised"] == second["raised"] == ["OSError", 28, "[Errno 28] full"]
    assert first["odd"] == ["Odd", None, "one"]
    assert second["odd"] == ["RuntimeError", None, "Odd: one"]
    assert first["first alone fails"] == ["ValueError", None, "mine"]
    assert second["first alone fails"][2] == "process 0 failed; its own output says why"
    assert first["second alone fails"][2] == "process 1 failed; its own output says why"
    assert second["second alone fails"] == ["ValueError", None, "mine"]
    assert (first["all succeed"], second["all succeed"]) == (0, 1)


def numbers(folder):
    results = json.loads((folder / "results.json").read_text())
    cells = results["seeds"][0]["cells"]
    losses = [results["seeds"][0][name]["loss"] for name in ("dense", "control")]
    losses += [cell["loss_pruned"] for cell in cells]
    losses += [cell["loss_retrained"] or 0.0 for cell in cells]
    return losses, results


@pytest.mark.slow
def test_the_main_job_runs_in_two_processes_as_in_one(tmp_path):
    text = write_text(tmp_path / "tiny.txt")
    command = ["-m", MODULE, "--text", text, *FLAGS]
    alone = tmp_path / "alone"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *map(str, command), "--mesh", "data=1", "--out", str(alone)],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    expected, one = numbers(alone)
    for mesh in ("data=2,model=2", "fsdp=4"):
        out = tmp_path / mesh
        arguments = [*command, "--mesh", mesh, "--out", out, *JOINED]
        output = two(arguments, tmp_path, devices=2)
        assert f"report: {out / 'report.html'}" in output[0]
        assert "report" not in output[1]
        results, both = numbers(out)
        assert max(abs(a - b) for a, b in zip(results, expected, strict=True)) < 1e-5
        assert both["config"] == one["config"]
        assert both["seeds"][0]["samples"] == one["seeds"][0]["samples"]
        steps = [[entry["step"] for entry in metrics(f)] for f in (out, alone)]
        assert steps[0] == steps[1]
        output = two(arguments, tmp_path, devices=2)
        assert "is finished" in output[0]
        assert "is finished" not in output[1]
