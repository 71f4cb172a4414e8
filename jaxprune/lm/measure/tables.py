"""Perplexities of several texts: measured with a bar, named, and shown as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.messages import columns
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.decoder.model import Decoder


def name_texts(paths: Sequence[Path]) -> list[str]:
    """A name for each file: that of the file, or its path where two have one name."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def measure_texts(
    decoder: Decoder, windows: Mapping[str, perplexity.Windows], batch: int
) -> dict[str, dict[str, Any]]:
    """The perplexity of a model on each text, with a bar.

    Args:
      decoder: model that is measured.
      windows: name of a text to its windows.
      batch: number of windows that the model sees at once.

    Returns:
      Name of a text to the result of `perplexity.measure`.
    """
    # One bar over all texts, since a short one would be gone before it is read.
    total = sum(len(text.tokens) for text in windows.values())
    with Progress(total, "evaluating", unit="window", leave=False) as progress:
        return {
            name: perplexity.measure_perplexity(
                decoder, text, batch=batch, progress=progress.update
            )
            for name, text in windows.items()
        }


def describe_windows(windows: perplexity.Windows) -> dict[str, Any]:
    """What a text is evaluated by, and what guessing by frequency would give."""
    return {**windows.facts, "by_frequency": perplexity.unigram_perplexity(windows)}


def format_perplexity(perplexity: float | None) -> str:
    """A perplexity in five digits; None is one that is not finite."""
    return "not finite" if perplexity is None else f"{perplexity:.5g}"


def format_bits(bits: float | None) -> str:
    """Bits per byte in four places; None is of token ids, or not finite."""
    return "-" if bits is None else f"{bits:.4f}"


def perplexity_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of one model, a row for each text, for people."""
    rows = [
        [
            name,
            format_perplexity(result["perplexity"]),
            "-" if result["nats"] is None else f"{result['nats']:.4f}",
            format_bits(result["bits_per_byte"]),
            str(result["tokens"]),
            str(result["context"]),
            str(result["stride"] or "rows"),
            format_perplexity(result["by_frequency"]),
        ]
        for name, result in results.items()
    ]
    header = ["text", "perplexity", "nats/token", "bits/byte", "tokens", "context"]
    return columns([[*header, "stride", "by frequency"], *rows], right=True)


def stage_table(
    stages: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    *,
    by_bytes: bool = False,
) -> str:
    """The perplexity on each text at each stage of a job, for people.

    Args:
      stages: stages, in order.
      results: name of a text to its results by stage.
      by_bytes: whether bits per byte are shown, since the stages have other tokens.

    Returns:
      A table with a row for each text.
    """

    def shown(result: Mapping[str, Any]) -> str:
        if by_bytes:
            return format_bits(result["bits_per_byte"])
        return format_perplexity(result["perplexity"])

    rows = [
        [name, *(shown(text[stage]) for stage in stages)]
        for name, text in results.items()
    ]
    figure = "bits/byte" if by_bytes else "perplexity"
    return columns([[figure, *stages], *rows], right=True)
