"""What `prune` and `shrink` say for people when they are done."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.measure.tables import stage_table
from jaxprune.lm.report.stages import measured
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import Job


def command_line(words: Sequence[str]) -> str:
    """The command as it may be typed again."""
    return shlex.join(["jaxprune", *words])


def say_done(
    job: Job, record: dict[str, Any], lines: Sequence[str], console: Console
) -> dict[str, Any]:
    """Says what became of a job.

    Args:
      job: what was asked for.
      record: record of the result.
      lines: results that only such a job has.
      console: where it is said.

    Returns:
      The object of `--json`.
    """
    if job.plan:  # which has said all
        return record
    if record.get("perplexity"):
        stages, texts = measured(record), record["perplexity"]
        # A text has other tokens then, of which perplexities do not compare.
        console.say(stage_table(stages, texts, by_bytes="vocabulary" in record))
    for table in likeness_tables(record):
        console.say(table)
    console.say("\n".join(lines))
    console.say(f"'{job.out}': the model, jaxprune.json, report.html")
    # Files of other formats, which a loader may miss.
    if omitted := open_directory(job.model).uncopied:
        console.note(f"not copied: {', '.join(omitted)}")
    return {**record, "out": str(job.out)}


def _left(before: Mapping[str, int], after: Mapping[str, int], name: str) -> str:
    label = {"width": "channels"}.get(name, name)
    return f"{after[name]:,} of {before[name]:,} {label}"


def likeness_tables(record: Mapping[str, Any]) -> list[str]:
    """What was measured of a model that is no language model, if anything."""
    rows = [
        [name, stage, f"{value['error']:.4g}", f"{value['agreement']:.2%}"]
        for name, entry in (record.get("outputs") or {}).items()
        for stage, value in entry.items()
        if isinstance(value, Mapping)
    ]
    header = ["outputs", "", "error", "top answers the same"]
    tables = [columns([header, *rows], right=True)] if rows else []
    numbers = [
        [name, stage, f"{value:.5g}"]
        for stage, values in (record.get("metric") or {}).items()
        for name, value in values.items()
    ]
    return [*tables, columns(numbers, right=True)] if numbers else tables


def prune_lines(record: dict[str, Any]) -> list[str]:
    """The results of a pruning."""
    sizes = record["sizes"]
    share = sizes["zeros"] / max(sizes["parameters"], 1)
    return [
        f"{record['achieved']:.4%} of the {sizes['size']:,} weights of "
        f"{len(record['tensors'])} matrices are zero, {share:.2%} of the model's "
        f"{sizes['parameters']:,} parameters ({record['method']}, "
        f"{record['pattern']}); {sizes['dense_bytes']:,} bytes of weights, about "
        f"{sizes['compact_bytes']:,} in a compact file; {record['seconds']:.1f} s"
    ]


def recover_lines(record: dict[str, Any]) -> list[str]:
    """The results of a recovery."""
    training = record["training"]
    first, last = training["losses"][0], training["losses"][-1]
    return [
        f"{training['steps']} steps of {record['method']}: loss {first:.4f} to "
        f"{last:.4f}; {record['seconds']:.1f} s"
    ]


def shrink_lines(record: dict[str, Any]) -> list[str]:
    """The results of a shrinking."""
    lines = []
    before, after = (record["sizes"][when] for when in ("before", "after"))
    # Of a model that went through torch the entries of config.json, which has others.
    shown = {"layers", *(["tokens"] if "vocabulary" in record else [])}
    shown |= {"width"} if "channels" in record else set()
    counts = {
        name: _left(before, after, name)
        for name in before
        if name in shown or (record.get("through") and name != "bytes")
    }
    counts = {"parameters": _left(before, after, "parameters"), **counts}
    lines.append(f"{', '.join(counts.values())}; {record['seconds']:.1f} s")
    return lines
