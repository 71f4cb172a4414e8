"""Any torch model: what `jp.torch` does with small models of transformers and timm.

`python -m benchmarks.torch_models docs/results/torch_models.csv` takes each model of
`benchmarks.torch_zoo` (random weights) as a function, compares the forward passes,
finds weights and groups, prunes half by SparseGPT, and removes half the units of every
group by magnitude. A row is written as each is done; models that are in the file are
not run again. It needs the extra [torch], transformers and timm. With Torch-Pruning
installed, `--torch-pruning` asks its pruner for the same on the same models.
"""

import contextlib
import csv
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import tyro

import jaxprune as jp
from benchmarks import measure, torch_zoo
from jaxprune.torch import comparison, conversion

COLUMNS = (
    *("model", "parameters", "forward_error", "matrices", "seen", "pruned"),
    *("groups", "removable", "left", "shrunk_error", "seconds", "stopped_at"),
)
TORCH_PRUNING_COLUMNS = (
    "model",
    "parameters",
    "left",
    "forward",
    "seconds",
    "stopped_at",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Takes models one after the other.

    Attributes:
      out: CSV file that rows are appended to.
      models: which, names of `benchmarks.torch_zoo`.
      limit: seconds that one model may take.
      torch_pruning: whether Torch-Pruning is asked in our place.
    """

    out: Annotated[Path, tyro.conf.Positional]
    models: tuple[str, ...] = tuple(torch_zoo.names())
    limit: int = 900
    torch_pruning: bool = False


def main(config: Config) -> None:
    """Takes the models that are not in the file yet, and prints the counts."""
    columns = TORCH_PRUNING_COLUMNS if config.torch_pruning else COLUMNS
    done = {row["model"] for row in rows_of(config.out)}
    pending = [name for name in config.models if name not in done]
    for name in measure.progress(pending, "models", "model"):
        row = dict.fromkeys(columns, "")
        row["model"] = name
        steps = torch_pruning_steps if config.torch_pruning else package_steps
        started = time.perf_counter()
        try:
            with time_limit(config.limit):
                steps(name, row)
        except Exception as failure:
            reason = (str(failure).strip().splitlines() or [""])[0]
            row["stopped_at"] += f": {type(failure).__name__}: {reason[:300]}"
        row["seconds"] = f"{time.perf_counter() - started:.1f}"
        append_row(config.out, columns, row)
        jax.clear_caches()
    print(summary(rows_of(config.out)))


def package_steps(name: str, row: dict[str, Any]) -> None:
    """Fills a row step by step, so that it says where a model stops."""
    row["stopped_at"] = "function"
    module, example = torch_zoo.make(name)
    fn, params = jp.torch.function(module, example)
    batch = jp.torch.as_arrays(example)
    row["parameters"] = sum(value.size for value in params.values())

    row["stopped_at"] = "forward"
    reference = comparison.outputs(module, example)
    difference = comparison.module_difference(jax.jit(fn)(params, batch), reference)
    row["forward_error"] = f"{difference:.1e}"

    row["stopped_at"] = "trace"
    trace = jp.trace(fn, params, batch)
    row["matrices"] = sum(value.ndim > 1 for value in params.values())
    row["seen"] = len({op.name for op in trace.linear_ops})

    row["stopped_at"] = "groups"
    groups = list(jp.axis_groups(fn, params, batch))
    row["groups"] = len(groups)
    row["removable"] = sum(group.default for group in groups)

    row["stopped_at"] = "prune"
    pruned = jp.prune_trained(
        fn,
        params,
        [batch],
        "sparsegpt",
        sparsity=0.5,
        prunable=lambda name, leaf: leaf.ndim > 1,
        progress=False,
    )
    row["pruned"] = f"{pruned.report['achieved']:.3f}"

    row["stopped_at"] = "shrink"
    small, report = jp.torch.shrink(module, example, jp.scores.magnitude, 0.5)
    parameters = {id(p): p.numel() for p in small.parameters()}
    row["left"] = f"{sum(parameters.values()) / row['parameters']:.3f}"
    row["shrunk_error"] = f"{report['error']:.1e}"
    row["stopped_at"] = ""


def torch_pruning_steps(name: str, row: dict[str, Any]) -> None:
    """Asks Torch-Pruning for half the units of every group by magnitude."""
    import torch_pruning

    row["stopped_at"] = "graph"
    module, example = torch_zoo.make(name)
    size = sum(p.numel() for p in module.parameters())
    row["parameters"] = size
    shapes = output_shapes(module, example)
    # The layers that make the result must stay, as they stay with us.
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1:]
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=last,
        output_transform=sum_of_tensors,
        forward_fn=call_module if isinstance(example, dict) else None,
    )
    row["stopped_at"] = "prune"
    pruner.step()
    row["left"] = f"{sum(p.numel() for p in module.parameters()) / size:.3f}"
    row["stopped_at"] = "forward"
    row["forward"] = output_shapes(module, example) == shapes
    row["stopped_at"] = "" if row["forward"] else "forward: other shapes"


def call_module(module: Any, example: dict[str, Any]) -> Any:
    """The output of a module that takes its arguments by name."""
    return module(**example)


def sum_of_tensors(output: Any) -> Any:
    """One number that all outputs are in, which Torch-Pruning goes back from."""
    if isinstance(output, torch.Tensor):  # which has `values` too
        return output.sum()
    tensors = output.values() if hasattr(output, "values") else output
    return sum(x.sum() for x in tensors if isinstance(x, torch.Tensor))


def output_shapes(module: Any, example: Any) -> list[tuple[int, ...]]:
    """The shapes of what a module gives."""
    return [np.shape(leaf) for leaf in jax.tree.leaves(_outputs(module, example))]


def _outputs(module: Any, example: Any) -> Any:
    with torch.no_grad():
        called = module(**example) if isinstance(example, dict) else module(example)
    return conversion.as_result(called)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises `TimeoutError` in the main thread after some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, columns: tuple[str, ...], row: dict[str, Any]) -> None:
    """Writes the file anew with one more row: a kill leaves no half of a row."""
    rows = [*rows_of(path), row]
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def summary(rows: list[dict[str, str]]) -> str:
    """How many models came through to the end, and where the others stopped.

    Args:
      rows: rows of a file.

    Returns:
      Lines of text.
    """
    stopped = [row for row in rows if row["stopped_at"]]
    lines = [f"{len(rows) - len(stopped)} of {len(rows)} models to the end"]
    return "\n".join([*lines, *(f"{x['model']}: {x['stopped_at']}" for x in stopped)])


if __name__ == "__main__":
    main(tyro.cli(Config))
