"""`jaxprune eval`: the perplexity of a model on texts."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxprune.cli import models
from jaxprune.cli.console import Console, columns
from jaxprune.evaluation import perplexity, texts
from jaxprune.models import hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(models.ModelOptions):
    """Measures a model's perplexity on texts, with context and stride said.

    A window of --context tokens moves on by --stride; of each window only the tokens
    that were not predicted before count. Shorter strides give more context and take
    longer.

    Attributes:
      model: the directory.
      text: plain text (.txt, .md), .jsonl with a "text" in each line, or .npy of int32
        token ids (sequences, length), whose rows are evaluated as they are.
      context: tokens of a window, BOS included.
      stride: how far a window moves on: at most --context - 1, which is what it
        predicts, and so far if left out.
      limit: at most so many windows of each text, from its beginning; all if left out.
      batch: windows that go through the model together.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    context: int = 512
    stride: int | None = None
    limit: int | None = None
    batch: int = 4

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Does it."""
        check_at_least_one(limit=self.limit, batch=self.batch)
        texts.check_files(self.text)
        tokenizer = needed_tokenizer(self.model, self.text)
        begins = models.beginning(tokenizer, self)
        model = models.found(self.model, self).read()
        files = [texts.read(p, tokenizer, model.config.vocab_size) for p in self.text]
        seen = {
            name: perplexity.windows(
                file,
                context=self.context,
                stride=self.context if self.stride is None else self.stride,
                bos=begins.token,
                limit=self.limit,
                longest=model.config.context,
            )
            for name, file in zip(named(self.text), files, strict=True)
        }
        found = {
            name: described(own) | {"sha256": file.sha256} | measured
            for (name, own), file, measured in zip(
                seen.items(),
                files,
                measure(model, seen, self.batch, console).values(),
                strict=True,
            )
        }
        console.say(table(found))
        console.say(f"sequences begin with {begins.why}")
        return {"model": str(self.model), "bos": begins.why, "texts": found}


def check_at_least_one(**options: int | None) -> None:
    """Refuses numbers under 1.

    Args:
      **options: by their names; None is fine.

    Raises:
      ValueError: one is.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {value}")


def needed_tokenizer(model: Path, files: tuple[Path, ...]) -> hf.Tokenizer | None:
    """The model's tokenizer, or None where all files hold token ids."""
    return None if all(map(texts.is_ids, files)) else hf.tokenizer(model)


def named(paths: tuple[Path, ...]) -> list[str]:
    """A name for each file: its own, or its path where two have one name."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def measure(
    model: models.Model,
    seen: dict[str, perplexity.Windows],
    batch: int,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """The perplexity on each text.

    Args:
      model: the model.
      seen: name to windows.
      batch: windows at a time.
      console: shows a bar.

    Returns:
      Name to what `perplexity.measure` gives.
    """
    total = sum(len(own.tokens) for own in seen.values())
    with console.bar("evaluating", total, "windows") as bar:
        return {
            name: perplexity.measure(
                model.graphdef, model.params, own, batch=batch, tick=bar.update
            )
            for name, own in seen.items()
        }


def described(seen: perplexity.Windows) -> dict[str, Any]:
    """How a text is evaluated, and what guessing by frequency would give."""
    return {**seen.facts, "by_frequency": perplexity.by_frequency(seen)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results for people."""
    rows = [
        [
            name,
            number(of["perplexity"]),
            "-" if of["nats"] is None else f"{of['nats']:.4f}",
            str(of["tokens"]),
            str(of["context"]),
            str(of["stride"] or "rows"),
            number(of["by_frequency"]),
        ]
        for name, of in found.items()
    ]
    header = ["text", "perplexity", "nats/token", "tokens", "context", "stride"]
    return columns([*header, "by frequency"], rows)


def number(value: float | None) -> str:
    """A perplexity in five digits."""
    return "infinite" if value is None else f"{value:.5g}"
