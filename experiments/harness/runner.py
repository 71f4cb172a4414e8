"""A whole run in its folder: every seed, then the results and the report, once."""

import contextlib
import dataclasses
import datetime
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import jaxprune as jp
from experiments import report
from experiments.harness import records, run_dir
from experiments.harness.plan import Plan
from experiments.harness.sweep import METRICS, Seed
from experiments.harness.task import Task
from experiments.report import findings
from jaxprune.arrays import processes
from jaxprune.arrays.console_progress import Progress
from jaxprune.typing import Prunable

_OF_THE_START = ("coordinator", "processes", "process_id")
"""Flags that join processes: of one start and not of the run."""


def in_folder(
    out: Path, identity: dict[str, Any], work: Callable[[], dict[str, Any]]
) -> Path:
    """Does a run, or what is left of it, and writes its results and report.

    Args:
      out: the run's folder.
      identity: JSON-able; what must be the same for a run to go on.
      work: does what is left and gives the results.

    Returns:
      The report's path.

    Raises:
      ValueError: the folder holds another run.
      OSError: the folder cannot be written to, or another process runs there.
    """
    shown = out / "report.html"
    with run_dir.locked(out):
        finished = out / "results.json"
        begun = run_dir.begun(out, identity)
        if begun and processes.on_first(finished.exists):
            _say(
                f"'{out}' is finished: see report.html there; give another --out to "
                "run anew."
            )
            return shown
        results = work()
        processes.on_first(lambda: _write(results, out))
    _say("\n".join([*findings.headline(results), "", f"report: {shown}"]))
    return shown


def _say(text: str) -> None:
    if processes.is_first():
        print(text)


def _write(results: dict[str, Any], out: Path) -> None:
    report.write_report(results, out)
    records.write_json(out / "results.json", results)


def seeds(
    numbers: Sequence[int],
    plan: Plan,
    task: Task,
    out: Path,
    identity: dict[str, Any],
    mesh: Mesh | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every stage of every seed, or what is left of them.

    Args:
      numbers: the seeds.
      plan: what is done for each.
      task: the model and its data.
      out: the run's folder.
      identity: what its checkpoints must be of.
      mesh: where the arrays live; None for one device.

    Returns:
      What results.json holds of each seed, and what the phases cost.
    """
    done, phases, writes = [], [], processes.is_first()
    with contextlib.ExitStack() as opened:
        log = None
        if writes:
            log = opened.enter_context(records.MetricsLog(out / METRICS))
        progress = opened.enter_context(
            Progress(len(numbers) * plan.stages(), "run", unit="stage", shown=writes)
        )
        for number in numbers:
            seed = Seed(number, plan, task, out, log, identity, progress, mesh)
            done.append(seed.run())
            phases += _summed(seed.stages.phases)
    return done, phases


def _summed(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One phase a name: costs added up, the peak of memory, the mean rate."""
    merged: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if phase["name"] not in merged:
            merged[phase["name"]] = dict(phase)
            continue
        total = merged[phase["name"]]
        tokens = [(p["tokens_per_second"] or 0) * p["seconds"] for p in (total, phase)]
        for field in ("seconds", "energy_kwh", "co2_kg"):
            if phase[field] is not None:
                total[field] = (total[field] or 0) + phase[field]
        total["tokens_per_second"] = sum(tokens) / total["seconds"] or None
        peaks = [p["peak_memory_bytes"] or 0 for p in (total, phase)]
        total["peak_memory_bytes"] = max(peaks) or None
    return list(merged.values())


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


def circumstances() -> dict[str, Any]:
    """What results.json says of the machine, the versions and the moment."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "versions": records.versions(),
        "device": records.device(),
        "finished": now.isoformat(timespec="seconds"),
    }


def costs(
    cells: list[dict[str, Any]],
    model: dict[str, Any],
    flops: Callable[[dict[str, float] | None], float],
) -> list[dict[str, Any]]:
    """Bytes and FLOPs of the first criterion's cells, in principle and per token.

    Args:
      cells: of one seed.
      model: what `described` gave.
      flops: a token's, of the dense model or with these shares of leaves removed.

    Returns:
      A row for each sparsity.
    """
    sizes = {name: leaf["size"] for name, leaf in model["leaves"].items()}
    first = cells[0]
    rows = []
    for cell in cells:
        if (cell["criterion"], cell["scope"]) != (first["criterion"], first["scope"]):
            continue
        shares = cell["sparsity_by_leaf"]
        packed = sum(
            4 * round(size * (1 - shares[name])) + -(-size // 8)
            if name in shares
            else 4 * size
            for name, size in sizes.items()
        )
        rows.append(
            {
                "sparsity": cell["sparsity"],
                "bytes_dense": 4 * sum(sizes.values()),
                "bytes_packed": packed,
                "flops_dense": flops(None),
                "flops_kept": flops(shares),
            }
        )
    return rows


def command(
    module: str, config: Any, *, without: Collection[str] = _OF_THE_START
) -> str:
    """The command line of a configuration, what is not its default.

    Args:
      module: what `python -m` runs.
      config: a dataclass.
      without: fields that are left out.

    Returns:
      A line for a shell.
    """
    words = ["python", "-m", module]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in without:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)
