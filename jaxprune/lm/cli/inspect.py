"""`jaxprune inspect`: what a directory holds, and what can be pruned of it, and how."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import tyro

from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.compact_sizes import Sizes, directory_sizes, packed_bytes
from jaxprune.lm.cli import parse
from jaxprune.lm.cli.console import Console, Options
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.masking import counts
from jaxprune.posttraining.passes.pruning import Name


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

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    sparsity: float | None = None
    exclude: tuple[str, ...] = ()

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Lists the tensors."""
        if self.sparsity is not None:
            counts.checked_sparsity(self.sparsity)
        source = open_directory(self.model)
        if self.exclude:
            parse.check_globs(self.exclude, source.tensors)
        counted = directory_sizes(source)
        rows = _rows(source, counted, self.exclude)
        made = _provenance(self.model)
        totals = {
            "dense_bytes": counted.dense_bytes,
            "compact_bytes": counted.compact_bytes,
            "zeros": counted.zeros,
            "size": counted.size,
            "prunable": sum(row["size"] for row in rows if row["pruned"]),
        }
        if self.sparsity is not None:
            zeros = {
                row["name"]: max(round(self.sparsity * row["size"]), row["zeros"])
                if row["pruned"]
                else row["zeros"]
                for row in rows
            }
            totals["compact_bytes_pruned"] = packed_bytes(source, zeros)
        able = _able(source)
        _say(console, rows, totals, made, self.sparsity)
        _say_able(console, able)
        return {
            "model": str(self.model),
            "tensors": rows,
            "totals": totals,
            **able,
            "provenance": made,
        }


def _rows(
    source: CheckpointDir, counted: Sizes, exclude: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = []
    for name, info in source.tensors.items():
        why = parse.why_kept(name, info, exclude)
        zeros, size = counted.by_tensor[name]
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


def _able(source: CheckpointDir) -> dict[str, Any]:
    """The methods that a directory can have, what it can be shrunk by, and why not."""
    try:
        shape = hf.load(source.path, lazy=True).config
    except (ValueError, OSError) as error:
        return {"methods": ["magnitude"], "shrinkable": [], "unsupported": str(error)}
    if not isinstance(shape, DecoderConfig):
        why = (
            "it sees pictures; jaxprune.lm.models.hf.load reads it for jp.prune_trained"
        )
        return {"methods": ["magnitude"], "shrinkable": [], "unsupported": why}
    return {
        "methods": list(get_args(Name)),
        "shrinkable": hf.shrinkable(source.config),
        "unsupported": None,
    }


def _say_able(console: Console, able: dict[str, Any]) -> None:
    if able["unsupported"]:
        console.say(
            f"can be pruned by magnitude alone: {parse.spoken(able['unsupported'])}"
        )
        return
    console.say(
        f"can be pruned by {', '.join(able['methods'])}; `jaxprune shrink` can remove "
        f"{', '.join(able['shrinkable'])}"
    )


def _provenance(directory: Path) -> dict[str, Any] | None:
    if not (directory / rewrite.NAME).is_file():
        return None
    record = rewrite.read_provenance(directory)
    known = ("method", "pattern", "sparsity", "achieved", "perplexity", "command")
    return {name: record[name] for name in known if name in record}


def _say(
    console: Console,
    rows: list[dict[str, Any]],
    totals: dict[str, Any],
    made: dict[str, Any] | None,
    sparsity: float | None,
) -> None:
    table = [
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
    console.say(columns([header, *table], right=True))
    share = totals["zeros"] / max(totals["size"], 1)
    console.say(
        f"\n{totals['size']:,} weights, {share:.2%} of them zero, "
        f"{totals['prunable']:,} in tensors that would be pruned"
    )
    console.say(
        f"{totals['dense_bytes']:,} bytes, about {totals['compact_bytes']:,} as a "
        "compact file"
    )
    if sparsity is not None:
        console.say(
            f"pruned to a sparsity of {sparsity:g}: about "
            f"{totals['compact_bytes_pruned']:,} bytes as a compact file"
        )
    if made is not None:
        known = {"method": "{}", "pattern": "{}", "sparsity": "sparsity {} asked"}
        known["achieved"] = "{:.4f} achieved"
        asked = made.get("sparsity")
        if isinstance(asked, dict):  # of `jaxprune shrink`, a share of each kind
            made = {**made, "sparsity": ", ".join(f"{k} {v}" for k, v in asked.items())}
        facts = [form.format(made[k]) for k, form in known.items() if k in made]
        console.say(f"made by jaxprune: {', '.join(facts)}")
