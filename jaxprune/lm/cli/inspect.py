"""`jaxprune inspect`: what a directory holds, and what can be pruned of it, and how."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, get_args

from jaxprune.arrays.messages import columns, listed
from jaxprune.arrays.rules import command_words
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.compact_sizes import Sizes, directory_sizes, packed_bytes
from jaxprune.lm.cli.options import Options
from jaxprune.lm.models import hf
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.exclusions import check_globs, why_kept
from jaxprune.lm.steps.option_types import MaybeNumber, ModelPath, Names
from jaxprune.lm.steps.settings import MethodName
from jaxprune.lm.torch_models import routing
from jaxprune.lm.torch_models.inspection import possible_through_torch
from jaxprune.masking import counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Options):
    """Lists a model's tensors: shape, zeros, size, and whether they would be pruned.

    Then it says which methods can prune the model, and what `shrink` can remove.

    Attributes:
      model: the directory.
      sparsity: say how large the model would be, pruned by this share, too.
      exclude: names of tensors to leave alone, as for `jaxprune prune`.
    """

    EXAMPLE: ClassVar = "jaxprune inspect MODEL --sparsity 0.5"

    model: ModelPath
    sparsity: MaybeNumber = None
    exclude: Names = ()

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Lists the tensors."""
        if self.sparsity is not None:
            counts.checked_sparsity(self.sparsity)
        source = open_directory(self.model)
        if self.exclude:  # without any, a model of nothing prunable is listed too
            check_globs(self.exclude, source.tensors)
        measured = directory_sizes(source)
        rows = _rows(source, measured, self.exclude)
        totals = {
            "dense_bytes": measured.dense_bytes,
            "compact_bytes": measured.compact_bytes,
            "zeros": measured.zeros,
            "size": measured.size,
            "prunable": sum(row["size"] for row in rows if row["pruned"]),
        }
        if self.sparsity is not None:
            zeros = _zeros_after(rows, self.sparsity)
            totals["compact_bytes_pruned"] = packed_bytes(source, zeros)
        possible = _possible(source)
        if possible.get("through"):
            console.note(f"the model would go through {possible['through']}")
        provenance = _provenance(self.model)
        console.say(_table(rows))
        console.say(_totals(totals, self.sparsity))
        if provenance is not None:
            console.say(_made_by(provenance))
        if measured.nonfinite:
            console.say(
                f"NaN or infinity is in {listed(measured.nonfinite)}: such a model "
                "is not run, and not pruned"
            )
        console.say(_possible_words(possible))
        return {
            "model": str(self.model),
            "tensors": rows,
            "totals": totals,
            "nonfinite": list(measured.nonfinite),
            **possible,
            "provenance": provenance,
        }


def _rows(
    source: CheckpointDir, measured: Sizes, exclude: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = []
    for name, info in source.tensors.items():
        why = why_kept(name, info, exclude)
        zeros, size = measured.by_tensor[name]
        rows.append(
            {
                "name": name,
                "shape": list(info.shape),
                "dtype": info.dtype.name,
                "zeros": zeros,
                "size": size,
                "bytes": info.size,
                "pruned": why is None,
                "why": why or "a matrix of a layer",
            }
        )
    return rows


def _zeros_after(rows: list[dict[str, Any]], sparsity: float) -> dict[str, int]:
    """Zeros of each tensor after a pruning, which keeps those of an earlier one."""
    return {
        row["name"]: max(round(sparsity * row["size"]), row["zeros"])
        if row["pruned"]
        else row["zeros"]
        for row in rows
    }


def _possible(source: CheckpointDir) -> dict[str, Any]:
    """The methods that a directory can have, what it can be shrunk by, and why not."""
    if routing.is_foreign(source.config):
        return possible_through_torch(source)
    # Magnitude needs no model, so that it prunes what nothing here can run.
    magnitude = {"methods": ["magnitude"], "shrinkable": []}
    try:
        hf.load(source.path, lazy=True)  # reads headers alone
    except (ValueError, OSError) as error:
        return magnitude | {"unsupported": command_words(error)}
    return {
        "methods": list(get_args(MethodName)),
        "shrinkable": hf.shrinkable(source.config),
        "unsupported": None,
    }


def _possible_words(possible: dict[str, Any]) -> str:
    if possible["unsupported"]:
        return f"can be pruned by magnitude alone: {possible['unsupported']}"
    way = f" through {possible['through']}" if possible.get("through") else ""
    return (
        f"can be pruned{way} by {', '.join(possible['methods'])}; `jaxprune shrink` "
        f"can remove {', '.join(possible['shrinkable']) or 'nothing'}"
    )


def _provenance(directory: Path) -> dict[str, Any] | None:
    """What jaxprune.json says, where there is one."""
    if not (directory / rewrite.NAME).is_file():
        return None
    record = rewrite.read_provenance(directory)
    known = ("method", "pattern", "sparsity", "achieved", "perplexity", "command")
    return {name: record[name] for name in known if name in record}


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["name"],
            " x ".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['zeros'] / max(row['size'], 1):.2%}",
            f"{row['bytes']:,}",
            "yes" if row["pruned"] else "no",
            row["why"],
        ]
        for row in rows
    ]
    header = ["tensor", "shape", "dtype", "zeros", "bytes", "pruned", "why"]
    return columns([header, *cells], right=True)


def _totals(totals: dict[str, Any], sparsity: float | None) -> str:
    share = totals["zeros"] / max(totals["size"], 1)  # a tensor may be empty
    lines = [
        f"\n{totals['size']:,} weights, {share:.2%} of them zero, "
        f"{totals['prunable']:,} in tensors that would be pruned",
        f"{totals['dense_bytes']:,} bytes of weights, about "
        f"{totals['compact_bytes']:,} in a compact file",
    ]
    if sparsity is not None:
        lines.append(
            f"pruned to a sparsity of {sparsity:g}: about "
            f"{totals['compact_bytes_pruned']:,} bytes of weights in a compact file"
        )
    return "\n".join(lines)


def _made_by(provenance: dict[str, Any]) -> str:
    sparsity = provenance.get("sparsity")
    if isinstance(sparsity, dict):  # of `jaxprune shrink`, a share of each unit
        words = ", ".join(f"{unit} {share}" for unit, share in sparsity.items())
        provenance = {**provenance, "sparsity": words}
    formats = {
        "method": "{}",
        "pattern": "{}",
        "sparsity": "sparsity {} asked",
        "achieved": "{:.4f} achieved",
    }
    facts = [f.format(provenance[k]) for k, f in formats.items() if k in provenance]
    return f"made by jaxprune: {', '.join(facts)}"
