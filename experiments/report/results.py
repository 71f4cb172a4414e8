"""results.json as checked numbers: what the tables, figures and comparisons read.

Losses are validation losses in nats per token. The loss right after pruning
(stage "pruned") is held against the dense model's of the same seed; the loss after
retraining (stage "retrained") against the dense *control* of the same seed, which
had the same number of steps in all.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Results = Mapping[str, Any]
Stage = Literal["pruned", "retrained"]

FORMAT = 2
CLOSE = 0.015  # nats: what figures and tables call "within" a reference
STAGES: tuple[Stage, ...] = ("pruned", "retrained")
COLUMNS = (
    *("seed", "criterion", "allocation", "sparsity", "achieved"),
    *("loss_pruned", "loss_retrained"),
    *("dense_loss", "dense_steps", "control_loss", "control_steps"),
)
MEASURES = ("accuracy", "perplexity", "foreign_loss", "foreign_perplexity")
"""What a run may measure besides the loss: questions answered right, in [0, 1]; exp of
the loss; and both of a text that it was not trained on."""


@dataclasses.dataclass(frozen=True)
class _Maybe:
    """What may be null, empty or absent, and else is of `schema`."""

    schema: Any


_RUN = {"steps": int, "loss": float}
_POINT = {"step": int, "loss": float, "validation_loss": _Maybe(float)}
_CELL = {
    **dict.fromkeys(("criterion", "allocation"), str),
    **dict.fromkeys(("sparsity", "achieved", "loss_pruned"), float),
    "loss_retrained": _Maybe(float),
    "sparsity_by_leaf": _Maybe(dict),
}
_WEIGHTS = {
    "steps": [float],
    "names": [str],
    "values": [[float]],
    "averages": [float],
    "kept": dict,
    "sparsity": float,
}
_SEED = {
    "seed": int,
    "start": _Maybe({"loss": float}),
    "dense": _RUN,
    "control": _Maybe(_RUN),
    "curve": _Maybe([_POINT]),
    "cells": [_CELL],
    "samples": _Maybe([{"label": str, "text": str}]),
    "weights": _Maybe(_WEIGHTS),
}
_MEASURED = ("tokens_per_second", "peak_memory_bytes", "energy_kwh", "co2_kg")
_PHASE = {"name": str, "seconds": float, **dict.fromkeys(_MEASURED, _Maybe(float))}
_COST = {
    **dict.fromkeys(("bytes_dense", "bytes_packed"), int),
    **dict.fromkeys(("sparsity", "flops_dense", "flops_kept"), float),
}
_ANY: dict[str, Any] = {
    "name": str,
    "config": dict,
    "versions": dict,
    "device": str,
    "finished": _Maybe(str),
    "command": _Maybe(str),
}
# Of an experiment whose report is tables: each says itself what is in a cell.
_TABLES = {**_ANY, "cells": [dict]}
_SWEEP = {
    **_ANY,
    "model": {"parameters": int, "prunable": int, "leaves": dict},
    "seeds": [_SEED],
    "phases": _Maybe([_PHASE]),
    "costs": _Maybe([_COST]),
    "averages": _Maybe([str]),
}
_KINDS = {str: "a text", dict: "an object", int: "an integer", float: "a number"}


def read(path: Path) -> dict[str, Any]:
    """The checked content of results.json, given the file or its directory.

    Raises:
      ValueError: the file is absent, is not JSON or is not a results.json.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"'{file}' does not exist; give a results.json that an experiment wrote, "
            "or the directory that holds it"
        )
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{file}' is not JSON ({error}); give a results.json that an experiment "
            "wrote, and run that experiment again if this one was cut short"
        ) from error
    tables = isinstance(results, Mapping) and "cells" in results
    check(results, name=str(file), tables=tables)
    return results


def check(results: Any, *, name: str = "results", tables: bool = False) -> None:
    """Refuses anything but complete results of the format written here.

    Args:
      results: content of a results.json.
      name: name of the results in the error.
      tables: whether they are cells of an experiment whose report is tables, which
        says itself what is in a cell, and not seeds of a sweep.

    Raises:
      ValueError: the format is another, or naming everything that is missing, of
        another kind, not finite, out of range or double.
    """
    version = results.get("format") if isinstance(results, Mapping) else None
    if version != FORMAT:
        subject = "format" if isinstance(results, Mapping) else type(results).__name__
        raise ValueError(
            f"'{name}' must be a results.json of format {FORMAT}, got {subject} "
            f"{version!r}; give one that this version's experiments wrote"
        )
    if tables:
        problems = list(_mismatches(results, _TABLES, ""))
    else:
        problems = list(_mismatches(results, _SWEEP, ""))
        problems = problems or list(_disagreements(results))
    if problems:
        listing = "; ".join(problems[:8])
        tail = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"'{name}' is not a complete results.json: {listing}{tail}; run the "
            "experiment again, or correct these entries"
        )


def _mismatches(value: Any, schema: Any, path: str) -> Iterator[str]:
    """Compares value and schema, yielding a sentence for each difference."""
    if isinstance(schema, _Maybe):
        # Empty lists are what a run writes that did not measure this.
        if value is not None and value not in ([], {}):
            yield from _mismatches(value, schema.schema, path)
    elif value is None:
        yield f"{path} is missing"
    elif isinstance(schema, dict):
        if not isinstance(value, Mapping):
            yield f"{path} must be an object, got {value!r:.40}"
            return
        for key, inner in schema.items():
            yield from _mismatches(value.get(key), inner, f"{path}.{key}".lstrip("."))
    elif isinstance(schema, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            yield f"{path} must be a list, got {value!r:.40}"
        elif not value:
            yield f"{path} is empty"
        else:
            for index, item in enumerate(value):
                yield from _mismatches(item, schema[0], f"{path}[{index}]")
    # In Python True is an integer; in JSON it is none.
    elif isinstance(value, bool) or not isinstance(
        value, (int, float) if schema is float else schema
    ):
        yield f"{path} must be {_KINDS[schema]}, got {value!r:.40}"
    elif schema is float and not math.isfinite(value):
        yield f"{path} must be finite, got {value}"


def _disagreements(results: Results) -> Iterator[str]:
    """What the schema cannot say: ranges, doubles, lengths, a control where needed."""
    numbers: set[int] = set()
    for index, seed in enumerate(results["seeds"]):
        path = f"seeds[{index}]"
        if seed["seed"] in numbers:
            yield f"{path}.seed is {seed['seed']} twice"
        numbers.add(seed["seed"])
        cells: set[tuple[str, str, float]] = set()
        for number, cell in enumerate(seed["cells"]):
            key = (cell["criterion"], cell["allocation"], cell["sparsity"])
            if not re.fullmatch(r"[\w-]+", cell["allocation"]):
                yield (
                    f"{path}.cells[{number}].allocation must be a word, as files are "
                    f"named after it, got {cell['allocation']!r}"
                )
            if not 0 <= cell["sparsity"] < 1:
                yield f"{path}.cells[{number}].sparsity must be in [0, 1), got {key[2]}"
            if key in cells:
                yield f"{path}.cells[{number}] repeats {key}"
            cells.add(key)
        if not seed.get("control") and any(
            cell.get("loss_retrained") is not None for cell in seed["cells"]
        ):
            yield f"{path}.control is missing though cells were retrained"
        if weights := seed.get("weights"):
            yield from _unequal(weights, f"{path}.weights")


def _unequal(weights: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields the lists about sampled weights that do not have one entry each."""
    count = len(weights["names"])
    lists = {"values": weights["values"], "averages": weights["averages"]}
    lists |= {f"kept.{name}": kept for name, kept in weights["kept"].items()}
    for name, values in lists.items():
        if len(values) != count:
            yield f"{path}.{name} must have {count} entries, got {len(values)}"
    if any(len(row) != len(weights["steps"]) for row in weights["values"]):
        yield f"{path}.values must have one value a step, {len(weights['steps'])}"


def columns(results: Results) -> tuple[str, ...]:
    """The names of the tidy table's columns."""
    names: tuple[str, ...] = COLUMNS
    for name in MEASURES:
        if any(name in seed["dense"] for seed in results["seeds"]):
            stages = [f"{name}_{stage}" for stage in STAGES]
            names += (*stages, f"dense_{name}", f"control_{name}")
    return names


def rows(results: Results) -> list[dict[str, Any]]:
    """The tidy table: one row per seed x criterion x allocation x sparsity.

    Its keys are `columns`; None where nothing was measured.
    """
    names, table = columns(results), []
    for seed in results["seeds"]:
        seed_record = {"seed": seed["seed"]}
        for run in ("dense", "control"):
            measured = seed.get(run) or {}
            seed_record |= {f"{run}_{name}": value for name, value in measured.items()}
        for cell in seed["cells"]:
            record = {**seed_record, **cell}
            table.append({name: record.get(name) for name in names})
    return table


@dataclasses.dataclass(frozen=True)
class Curve:
    """The loss of one criterion against sparsity, every seed beside its reference.

    Attributes:
      criterion: the criterion's name.
      allocation: "layer" or "global".
      stage: "pruned" or "retrained".
      sparsities: the requested sparsities, ascending, of shape (points,).
      losses: nats per token, of shape (seeds, points), masked where not measured.
      reference: the loss of each seed's dense model ("pruned") or dense control
        ("retrained"), of shape (seeds, 1).
    """

    criterion: str
    allocation: str
    stage: Stage
    sparsities: np.ndarray
    losses: np.ma.MaskedArray
    reference: np.ndarray

    @functools.cached_property
    def above(self) -> np.ma.MaskedArray:
        """Nats above the reference of the same seed, of shape (seeds, points)."""
        return self.losses - self.reference

    def reach(
        self, limit: float, *, relative: bool = False, worst: bool = False
    ) -> float | None:
        """The sparsity up to which every tested loss stays close to the reference.

        Args:
          limit: nats above the reference, or a fraction of it when `relative`.
          relative: whether `limit` is a fraction of the reference's loss.
          worst: whether every seed is held to the limit rather than their mean.

        Returns:
          The largest such sparsity, or None where the first is already over.
        """
        above = self.above / self.reference if relative else self.above
        within = (above.max(0) if worst else above.mean(0)) <= limit
        # Up to the first sparsity that is too far off, were later ones near again by
        # chance.
        count = int(np.logical_and.accumulate(np.ma.filled(within, False)).sum())
        return float(self.sparsities[count - 1]) if count else None


def curves(
    results: Results, stage: Stage, allocation: str | None = None
) -> list[Curve]:
    """The curves of a stage, by criterion and allocation in order of appearance.

    One for each pair that has a loss at this stage, of one allocation if it is given.
    """
    seeds = results["seeds"]
    losses: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for index, seed in enumerate(seeds):
        for cell in seed["cells"]:
            loss = cell.get(f"loss_{stage}")
            if loss is not None and allocation in (None, cell["allocation"]):
                points = losses.setdefault((cell["criterion"], cell["allocation"]), {})
                points.setdefault(cell["sparsity"], {})[index] = loss
    run = "dense" if stage == "pruned" else "control"
    reference = [[(seed.get(run) or {}).get("loss", math.nan)] for seed in seeds]
    stage_curves = []
    for (criterion, curve_allocation), points in losses.items():
        grid = np.full((len(seeds), len(points)), math.nan)  # NaN: not measured
        for column, sparsity in enumerate(sorted(points)):
            for index, loss in points[sparsity].items():
                grid[index, column] = loss
        masked = np.ma.masked_invalid(grid)
        ordered = np.asarray(sorted(points))
        stage_curves.append(
            Curve(
                criterion,
                curve_allocation,
                stage,
                ordered,
                masked,
                np.asarray(reference),
            )
        )
    return stage_curves


def foreign(results: Results) -> dict[str, Any] | None:
    """The same results with the foreign text's losses in the place of the loss.

    None where no foreign text was measured. What reads losses then reads those.
    """

    def of(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return {**measured, "loss": measured.get("foreign_loss")} if measured else None

    seeds = []
    for seed in results["seeds"]:
        if "foreign_loss" not in seed["dense"]:
            return None
        runs = {run: of(seed.get(run)) for run in ("start", "dense", "control")}
        stages = {f"loss_{stage}": f"foreign_loss_{stage}" for stage in STAGES}
        cells = [
            {**cell, **{loss: cell.get(name) for loss, name in stages.items()}}
            for cell in seed["cells"]
        ]
        seeds.append({**seed, **runs, "cells": cells})
    return {**results, "seeds": seeds}


def criteria(results: Results) -> list[str]:
    """The criteria in order of first appearance."""
    cells = (cell for seed in results["seeds"] for cell in seed["cells"])
    return list(dict.fromkeys(cell["criterion"] for cell in cells))


def allocations(results: Results) -> list[str]:
    """The allocations in order of first appearance."""
    cells = (cell for seed in results["seeds"] for cell in seed["cells"])
    return list(dict.fromkeys(cell["allocation"] for cell in cells))


def extra_steps(results: Results) -> int | None:
    """The steps that the dense control had beyond the dense model, if there is one."""
    seeds = results["seeds"]
    if not all(seed.get("control") for seed in seeds):
        return None
    return int(seeds[0]["control"]["steps"] - seeds[0]["dense"]["steps"])


def table_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as a CSV with a header; None becomes an empty field."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
