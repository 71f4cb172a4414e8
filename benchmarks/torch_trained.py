"""Trained torch models that packages ship, pruned, shrunk and trained on in torch.

`python -m benchmarks.torch_trained docs/results/torch_trained.csv --model crepe-tiny`
takes a model of `benchmarks.torch_shipped`. It prunes by five methods, and by other
allocations than the same share of every weight, and removes channels, heads and
neurons by magnitude and by the solver, with as many from each group or, by
`--unit-allocations damage`, more from the groups that can best spare them. Each result
is a torch module, measured in torch by the model's own measure, trained for 100 steps
to give what the dense model gives, with its zeros held (`jp.torch.hold`), and measured
again. Its forward pass is timed in turns with that of the dense model. A row is written
as each is done; rows that are in the file are not run again.
"""

import copy
import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

import jaxprune as jp
from benchmarks import measure, torch_shipped
from benchmarks.torch_models import append_row, rows_of
from benchmarks.unit_damage import shares_by_damage

COLUMNS = (
    *("model", "what", "by", "allocation", "removed", "weights_left", "score"),
    *("recovered", "seconds", "milliseconds", "dense_milliseconds", "stopped_at"),
)
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "alps_per_output": ("alps", {"pattern": "per-output"}, False),
    "sparsegpt_per_output": ("sparsegpt", {"pattern": "per-output"}, False),
    "alps_dense_inputs": ("alps", {"inputs": "dense"}, False),
    "alps_more_inputs": ("alps", {}, True),
}
"""Other ways to call a method: its name, settings, and whether with `more_inputs`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Takes one model.

    Attributes:
      out: CSV file that rows are appended to.
      model: which of `benchmarks.torch_shipped`.
      sparsities: shares of the weights that each method removes.
      units: shares of the units of every group that are removed.
      methods: names of `jp.passes`, or of `VARIANTS`.
      allocations: other ways to share the weights out, for `allocated`.
      allocated: methods that they are tried with.
      allocated_sparsities: shares that they are tried at.
      unit_allocations: how the units that go are shared out: "all" for one share of
        every group, "damage" for those of `benchmarks.unit_damage`.
      unit_choices: who chooses them, "magnitude" or "solver".
      steps: number of steps of recovery, 0 for none.
      learning_rate: learning rate of Adam in them.
      repeats: number of timed forward passes.
    """

    out: Annotated[Path, tyro.conf.Positional]
    model: str = "crepe-tiny"
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.5, 0.7)
    units: tuple[float, ...] = (0.25, 0.5)
    methods: tuple[str, ...] = METHODS
    allocations: tuple[str, ...] = ("global", "erk", "owl")
    allocated: tuple[str, ...] = ("magnitude", "sparsegpt")
    allocated_sparsities: tuple[float, ...] = (0.8,)
    unit_allocations: tuple[str, ...] = ("all",)
    unit_choices: tuple[str, ...] = ("magnitude", "solver")
    steps: int = 100
    learning_rate: float = 1e-3
    repeats: int = 15


@dataclasses.dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
      what: "dense", "weights" or "units".
      by: method, or for units "magnitude" or "solver".
      allocation: how weights are shared out, or which groups lose units.
      removed: share that is removed.
    """

    what: str
    by: str = ""
    allocation: str = ""
    removed: float = 0.0


def main(config: Config) -> None:
    """Runs what is not in the file yet, and prints the model's table."""
    shipped = torch_shipped.make(config.model)
    measure.begin(config.out, config, "steps", "learning_rate")
    done = {_job_of(r) for r in rows_of(config.out) if r["model"] == config.model}
    pending = [job for job in jobs(config) if job not in done]
    for job in measure.progress(pending, config.model, "job"):
        row = dict.fromkeys(COLUMNS, "") | dataclasses.asdict(job)
        row["model"] = config.model
        try:
            run(shipped, job, config, row)
        except Exception as failure:
            reason = (str(failure).strip().splitlines() or [""])[0]
            row["stopped_at"] = f"{type(failure).__name__}: {reason[:300]}"
        append_row(config.out, COLUMNS, row)
    rows = [r for r in rows_of(config.out) if r["model"] == config.model]
    print(table(rows, "score"), table(rows, "recovered"), sep="\n\n")
    measure.report(
        "torch_trained", config=dataclasses.asdict(config) | {"out": str(config.out)}
    )


def jobs(config: Config) -> list[Job]:
    """The rows of a model.

    Args:
      config: settings.

    Returns:
      Jobs, the dense model first.
    """
    return [
        Job("dense"),
        *(
            Job("units", by, allocation, share)
            for share in config.units
            for by in config.unit_choices
            for allocation in config.unit_allocations
        ),
        *(
            Job("weights", by, "layer", share)
            for share in config.sparsities
            for by in config.methods
        ),
        *(
            Job("weights", by, allocation, share)
            for share in config.allocated_sparsities
            for by in config.allocated
            for allocation in config.allocations
        ),
    ]


def _job_of(row: dict[str, str]) -> Job:
    return Job(row["what"], row["by"], row["allocation"], float(row["removed"]))


def run(
    shipped: torch_shipped.Shipped, job: Job, config: Config, row: dict[str, Any]
) -> None:
    """Fills a row: what is left, its score, its score after recovery, and times.

    Args:
      shipped: the model.
      job: what to do with it.
      config: settings.
      row: filled.
    """
    started = time.perf_counter()
    smaller = changed(shipped, job)
    row["seconds"] = f"{time.perf_counter() - started:.0f}"
    row["weights_left"] = weights_left(smaller)
    row["score"] = f"{shipped.measure(smaller):.4f}"
    if job.what == "dense":
        return
    times = milliseconds(shipped.module, smaller, shipped.calibration[0], config)
    row["dense_milliseconds"], row["milliseconds"] = (f"{x:.2f}" for x in times)
    if config.steps:
        recover(smaller, shipped, config)
        row["recovered"] = f"{shipped.measure(smaller):.4f}"


def changed(shipped: torch_shipped.Shipped, job: Job) -> Any:
    """The model pruned, or without some units; a new module.

    Args:
      shipped: the model.
      job: what to do with it.

    Returns:
      A module in eval mode.
    """
    module, batches = shipped.module, shipped.calibration
    if job.what == "units":
        shares = dict.fromkeys((*shipped.asked_groups, "*"), job.removed)
        if job.allocation == "damage":
            shares = shares_by_damage(shipped, job.removed)
        if job.by == "magnitude":
            scores = functools.partial(jp.scores.magnitude, prunable=is_matrix)
            small = jp.torch.shrink(module, batches[0], scores, shares)
        else:
            small = jp.torch.shrink(
                module,
                batches[0],
                sparsity=shares,
                batches=batches,
                progress=False,
            )
        return small.module
    pruned = copy.deepcopy(module)
    if job.what == "weights":
        fn, params = jp.torch.function(module, batches[0])
        method, settings, more = VARIANTS.get(job.by, (job.by, {}, False))
        if more:
            batches = [*batches, *more_inputs(shipped)]
        result = jp.prune_trained(
            fn,
            params,
            [jp.torch.as_arrays(batch) for batch in batches],
            method,
            sparsity=job.removed,
            allocation=job.allocation,
            prunable=is_matrix,
            progress=False,
            **settings,
        )
        jp.torch.load(pruned, result.params)
    return pruned


def more_inputs(shipped: torch_shipped.Shipped) -> list[Any]:
    """Three times as many inputs as calibrate, in batches of the same size.

    Args:
      shipped: the model.

    Returns:
      Batches of other numbers than recovery's; where a model has few inputs for that,
      as the LSTM has, they come several times.
    """
    size = len(_first(shipped.calibration[0])) // len(_first(shipped.batch(0)))
    steps = iter(range(5000, 10_000))
    return [
        _joined([shipped.batch(next(steps)) for _ in range(size)])
        for _ in range(3 * len(shipped.calibration))
    ]


def _first(batch: Any) -> Any:
    return next(iter(batch.values())) if isinstance(batch, dict) else batch


def _joined(batches: list[Any]) -> Any:
    if isinstance(batches[0], dict):
        return {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}
    return torch.cat(batches)


def is_matrix(name: str, leaf: Any) -> bool:
    """Whether a leaf counts: heads and embeddings do too, unlike by default.

    Args:
      name: name of the leaf.
      leaf: the array.

    Returns:
      True for all but vectors.
    """
    return leaf.ndim > 1


def recover(module: Any, shipped: torch_shipped.Shipped, config: Config) -> None:
    """Trains a module towards the dense one, with its zeros held, in place.

    Args:
      module: the pruned or smaller module; stays in eval mode.
      shipped: the dense one and its batches.
      config: settings.
    """
    masks = {
        name: (value != 0).numpy()
        for name, value in module.named_parameters()
        if value.ndim > 1
    }
    optimizer = torch.optim.Adam(module.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    module.requires_grad_(True)
    with jp.torch.hold(module, masks):
        for step in range(config.steps):
            batch = shipped.batch(step)
            with torch.no_grad():
                answers = outputs(shipped.module, batch)
            pairs = zip(outputs(module, batch), answers, strict=True)
            loss = sum(distance(*pair, shipped.probabilities) for pair in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def distance(output: Any, answer: Any, probabilities: bool) -> Any:
    """How far an output is from the dense model's answer.

    Args:
      output: tensor.
      answer: tensor of the same shape.
      probabilities: whether both are; then it is their cross entropy, since squares
        have no gradient where a probability is near 0.

    Returns:
      A number: the sum over the last axis, or the squares in units of the variance.
    """
    if probabilities:
        mean = torch.nn.functional.binary_cross_entropy(output, answer)
        return mean * answer.shape[-1]
    return (output - answer).square().mean() / answer.var()


def outputs(module: Any, batch: Any) -> list[Any]:
    """The tensors that a module gives.

    Args:
      module: the module.
      batch: a tensor or arguments by name.

    Returns:
      Tensors.
    """
    result = module(**batch) if isinstance(batch, dict) else module(batch)
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [value for value in values if isinstance(value, torch.Tensor)]


def milliseconds(
    module: Any, smaller: Any, batch: Any, config: Config
) -> tuple[float, float]:
    """Times of a forward pass, medians of passes in turns.

    Args:
      module: the dense module.
      smaller: the other.
      batch: what both are called with.
      config: settings.

    Returns:
      Milliseconds of the dense module and of the other.
    """
    with torch.no_grad():
        times = measure.interleaved(
            {
                "dense": lambda: outputs(module, batch) and None,
                "smaller": lambda: outputs(smaller, batch) and None,
            },
            config.repeats,
        )
    dense, small = (1000 * float(np.median(times[key])) for key in times)
    return dense, small


def weights_left(model: Any) -> int:
    """How many weights are not zero.

    Args:
      model: torch module.

    Returns:
      Their number, tied ones once.
    """
    return sum(int((p != 0).sum()) for p in model.parameters())


def table(rows: list[dict[str, str]], column: str) -> str:
    """A column by what was removed, a row each, in Markdown.

    Args:
      rows: rows of one model.
      column: "score" or "recovered".

    Returns:
      The table.
    """
    lines = [["removed", *METHODS, "solver"]]
    cells = {_job_of(r): r[column] or r["stopped_at"][:40] for r in rows}
    for what, allocation, removed in dict.fromkeys(
        (job.what, job.allocation, job.removed) for job in cells
    ):
        if what == "dense":
            head, by = "nothing", [cells[Job("dense")], *[""] * 5]
        else:
            head = f"{removed:.0%} of the {what}, {allocation}"
            by = [
                cells.get(Job(what, method, allocation, removed), "")
                for method in lines[0][1:]
            ]
        lines.append([head, *by])
    return measure.markdown(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
