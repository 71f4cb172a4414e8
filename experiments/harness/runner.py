"""A whole experiment in its directory: the cells, then the results and the report."""

import contextlib
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from jax.sharding import Mesh

import jaxprune as jp
from experiments.harness import records
from experiments.harness.plan import Plan
from experiments.harness.sweep import METRICS, Seed
from experiments.harness.task import Task
from experiments.report import page
from experiments.report import sweep as sweep_report
from jaxprune.arrays import processes
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic
from jaxprune.typing import Prunable


def from_command_line(main: Callable[[Any], object], config: type) -> None:
    """Runs an experiment with the flags given; an error is one line and status 1."""
    try:
        main(tyro.cli(config))
    except (ValueError, OSError, ImportError, FloatingPointError) as problem:
        sys.exit(f"error: {problem}")


def run(
    name: str,
    out: Path,
    identity: dict[str, Any],
    cells: Callable[[], dict[str, Any]],
    report: Callable[[dict[str, Any]], page.Report],
    *,
    grows: bool = False,
) -> Path:
    """Does an experiment, or what is left of it; returns the path of its results.json.

    Args:
      name: name of the experiment's module in `experiments`.
      out: directory of the run.
      identity: settings that must be the same for a run to continue; JSON-able.
      cells: function that does what is missing and returns the numbers of all.
      report: function of results to what is shown of them.
      grows: whether other seeds or sparsities add to a finished run.

    Raises:
      ValueError: the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
    """
    path = out / "results.json"
    # One config.json for good: cells of two experiments must not meet in one directory.
    job = {"experiment": name, **identity}
    with contextlib.ExitStack() as lock:
        # The lock is the kernel's, on an open file: it goes with the process, however
        # that ends.
        processes.on_first(lambda: lock.enter_context(atomic.locked(out)))
        processes.on_first(lambda: atomic.begin_or_resume(out / "config.json", job))
        finished = processes.on_first(path.exists)
        if finished and not grows:
            _say(f"'{out}' is finished: see report.html there; another --out runs anew")
            return path
        content = cells()

        def write() -> str:
            now = datetime.datetime.now(datetime.UTC)
            results = {
                "name": name,
                "command": shlex.join(["python", *sys.orig_argv[1:]]),
                "config": identity,
                "versions": records.versions(),
                "device": records.device(),
                "finished": now.isoformat(timespec="seconds"),
                **content,
            }
            if finished:
                before = json.loads(path.read_text())
                # Where nothing was done, what made the cells is what made them before.
                if all(before.get(key) == value for key, value in content.items()):
                    results = before
            shown = page.write(results, out, report(results))
            # After the report: results.json says that it is whole.
            atomic.replace_json(path, results)
            return shown

        _say(processes.on_first(write))
    return path


def sweep(
    name: str,
    config: Any,
    plan: Plan,
    task: Task,
    identity: dict[str, Any],
    mesh: Mesh | None,
    more: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Path:
    """Trains and prunes in every way of a plan, for every seed; writes the report.

    Args:
      name: name of the experiment's module in `experiments`.
      config: configuration of the experiment.
      plan: numbers that fix the stages of a seed.
      task: model and its data.
      identity: settings that `identity_of` returns; they name the seeds.
      mesh: devices that the arrays live on; None for one device.
      more: function of the seeds' results that returns further entries of
        results.json.

    Raises:
      FloatingPointError: a loss is not finite; and what `run` raises.
    """

    def cells() -> dict[str, Any]:
        numbers, writes = identity["seeds"], processes.is_first()
        stages = len(numbers) * (plan.stages() + task.begins_trained)
        log = records.MetricsLog(config.out / METRICS) if writes else None
        seeds, phases = [], []
        with Progress(stages, "run", unit="stage", shown=writes) as progress:
            for number in numbers:
                seed = Seed(
                    number, plan, task, config.out, log, identity, progress, mesh
                )
                seeds.append(seed.run())
                phases += records.summed(seed.stages.phases)
        return {"seeds": seeds, "phases": phases, **more(seeds)}

    return run(name, config.out, identity, cells, sweep_report.report)


def identity_of(config: Any, plan: Plan, **specifics: Any) -> dict[str, Any]:
    """What must be the same for a run of `sweep` to continue; JSON-able."""
    return {
        "preset": getattr(config, "preset", None),
        "dtype": config.dtype,
        "seeds": config.seeds[:1] if config.smoke else config.seeds,
        "smoke": config.smoke,
        **specifics,
        # Defaults that a preset filled in are in the plan, so a changed preset is
        # noticed.
        **dataclasses.asdict(plan),
    }


def _say(text: str) -> None:
    if processes.is_first():
        print(text)


def described(task: Task, prunable: Prunable) -> dict[str, Any]:
    """What results.json says of the model: its leaves, and which may be pruned."""
    leaves = jp.tree.named_leaves(task.shapes)
    shown = {
        name: {
            "shape": list(leaf.shape),
            "size": leaf.size,
            "prunable": prunable(name, leaf),
        }
        for name, leaf in leaves.items()
    }
    return {
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "prunable": sum(leaf["size"] for leaf in shown.values() if leaf["prunable"]),
        "leaves": shown,
    }


def costs(
    cells: list[dict[str, Any]],
    model: dict[str, Any],
    flops: Callable[[dict[str, float] | None], float],
) -> list[dict[str, Any]]:
    """Bytes and FLOPs of the first criterion's cells, a row for each sparsity.

    `flops` is of a token: dense for None, else for the fraction removed of each leaf.
    """
    sizes = {name: leaf["size"] for name, leaf in model["leaves"].items()}
    rows = []
    for cell in cells:
        if any(cell[key] != cells[0][key] for key in ("criterion", "allocation")):
            continue
        removed = cell["sparsity_by_leaf"]
        packed = sum(
            # Bytes: float32 values that are kept, and one bit a weight that says which.
            4 * round(size * (1 - removed[name])) + -(-size // 8)
            if name in removed
            else 4 * size
            for name, size in sizes.items()
        )
        rows.append(
            {
                "sparsity": cell["sparsity"],
                "bytes_dense": 4 * sum(sizes.values()),
                "bytes_packed": packed,
                "flops_dense": flops(None),
                "flops_kept": flops(removed),
            }
        )
    return rows
