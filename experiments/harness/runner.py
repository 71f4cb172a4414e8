"""A whole experiment in its directory: the cells, then the results and the report."""

import contextlib
import dataclasses
import datetime
import json
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from jax.sharding import Mesh

import jaxprune as jp
from experiments import report
from experiments.harness import manifest, records, run_dir
from experiments.harness.criteria import averages
from experiments.harness.plan import Plan
from experiments.harness.solvers import rankings
from experiments.harness.sweep import METRICS, Seed
from experiments.harness.task import Task
from experiments.report import findings
from experiments.report import results as results_
from jaxprune.arrays import processes
from jaxprune.arrays.console_progress import Progress
from jaxprune.typing import Prunable


def from_command_line(main: Callable[[Any], object], config: type) -> None:
    """Runs an experiment with the flags given; a refusal is one line and status 1."""
    try:
        main(tyro.cli(config))
    except (ValueError, OSError, ImportError, FloatingPointError) as problem:
        sys.exit(f"error: {problem}")


def run(
    name: str,
    config: Any,
    identity: dict[str, Any],
    cells: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any], Path], str],
    *,
    grows: bool = False,
    command_line: str | None = None,
) -> Path:
    """Does an experiment, or what is left of it; returns the path of its results.json.

    Args:
      name: name of the experiment's module in `experiments`.
      config: configuration of the experiment; `out` is the directory.
      identity: settings that must be the same for a run to continue; JSON-able.
      cells: function that does what is missing and returns the numbers of all.
      show: function that writes tables and figures of the results to a directory, and
        returns the text to print.
      grows: whether other seeds or sparsities add to a finished run.
      command_line: command that makes the run, where it is not the module's own.

    Raises:
      ValueError: the directory holds another run, or another experiment's.
      OSError: the directory cannot be written to, or another process runs there.
    """
    out = config.out
    path = out / "results.json"
    with run_dir.locked(out):
        continues = run_dir.begun(out, identity)
        if continues and not grows and processes.on_first(path.exists):
            _say(
                f"'{out}' is finished: see report.html there; give another --out to "
                "run anew."
            )
            return path
        # Also of a run that grows: cells of two experiments must not meet in one file.
        earlier_name = processes.on_first(lambda: _experiment(path)) or name
        if earlier_name != name:
            raise ValueError(
                f"'{out}' holds the results of {earlier_name}; give another --out"
            )
        content = cells()
        results = {
            "format": results_.FORMAT,
            "name": name,
            "command": command_line or command(f"experiments.{name}", config),
            "config": identity,
            **_circumstances(),
            **content,
        }

        def write() -> str:
            # Where nothing was done, what made the cells is what made them before.
            before = json.loads(path.read_text()) if path.exists() else {}
            unchanged = all(
                before.get(name) == value for name, value in content.items()
            )
            kept: dict[str, Any] = before if unchanged else results
            shown = show(kept, out)
            # After the tables and figures: results.json says that the report is whole.
            records.write_json(path, kept)
            return shown

        _say(processes.on_first(write))
    return path


def _experiment(path: Path) -> str | None:
    """Which experiment's results these are."""
    return json.loads(path.read_text()).get("name") if path.exists() else None


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
        seeds, phases = _seeds(plan, task, config.out, identity, mesh)
        # What tracking costs in the life cycle depends on how many averages were held.
        averages_held = sorted(averages(rankings(plan.criteria)))
        return {
            "seeds": seeds,
            "phases": phases,
            "averages": averages_held,
            **more(seeds),
        }

    def show(results: dict[str, Any], out: Path) -> str:
        report.write_report(results, out)
        page = out / "report.html"
        return "\n".join([*findings.headline(results), "", f"report: {page}"])

    return run(name, config, identity, cells, show)


def identity_of(config: Any, plan: Plan, **specifics: Any) -> dict[str, Any]:
    """What must be the same for a run of `sweep` to continue; JSON-able."""
    return manifest.as_json(
        {
            "preset": getattr(config, "preset", None),
            "dtype": config.dtype,
            "seeds": config.seeds[:1] if config.smoke else config.seeds,
            "smoke": config.smoke,
            **specifics,
            # Defaults that a preset filled in are in the plan, so a changed preset is
            # noticed.
            **dataclasses.asdict(plan),
        }
    )


def _say(text: str) -> None:
    if processes.is_first():
        print(text)


def _seeds(
    plan: Plan, task: Task, out: Path, identity: dict[str, Any], mesh: Mesh | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What results.json holds of each seed, and what the phases cost."""
    numbers, seeds, phases = identity["seeds"], [], []
    writes = processes.is_first()
    stages = plan.stages() + task.begins_trained  # a trained model is measured first
    with contextlib.ExitStack() as opened:
        log = None
        if writes:
            log = opened.enter_context(records.MetricsLog(out / METRICS))
        progress = opened.enter_context(
            Progress(len(numbers) * stages, "run", unit="stage", shown=writes)
        )
        for number in numbers:
            seed = Seed(number, plan, task, out, log, identity, progress, mesh)
            seeds.append(seed.run())
            phases += _summed(seed.stages.phases)
    return seeds, phases


def _summed(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One phase a name: costs added up, the peak of memory, the mean rate."""
    merged: dict[str, dict[str, Any]] = {}
    for phase in phases:
        if phase["name"] not in merged:
            merged[phase["name"]] = dict(phase)
            continue
        total = merged[phase["name"]]
        # Rates do not add: tokens and seconds do, and their ratio is the mean rate.
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


def _circumstances() -> dict[str, Any]:
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
    """Bytes and FLOPs of the first criterion's cells, a row for each sparsity.

    `flops` is of a token: dense for None, else for the fraction removed of each leaf.
    """
    sizes = {name: leaf["size"] for name, leaf in model["leaves"].items()}
    reference = cells[0]
    rows = []
    for cell in cells:
        if (cell["criterion"], cell["allocation"]) != (
            reference["criterion"],
            reference["allocation"],
        ):
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


def command(module: str, config: Any) -> str:
    """The command line of a configuration, without what is its default."""
    first, words = ["python", "-m", module], []  # positional values first, then flags
    kinds = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        # The shortest command that makes the same run, fit to be read in a report.
        if value == default or field.name == "distributed":
            continue
        if tyro.conf.Positional in getattr(kinds[field.name], "__metadata__", ()):
            first.append(str(value))
            continue
        words += _flags(field.name, value, default)
    return shlex.join([*first, *words])


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _flags(name: str, value: Any, default: Any) -> list[str]:
    """The words of one field, or of what differs within it."""
    if dataclasses.is_dataclass(value):
        words: list[str] = []
        for field in dataclasses.fields(value):
            inner, usual = getattr(value, field.name), getattr(default, field.name)
            if inner != usual:
                words += _flags(f"{name}.{field.name}", inner, usual)
        return words
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
