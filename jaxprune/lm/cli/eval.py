"""`jaxprune eval`: the perplexity of a model on texts."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.messages import columns
from jaxprune.lm.cli import models, parse
from jaxprune.lm.cli.console import Console
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf
from jaxprune.lm.report.stages import measured
from jaxprune.lm.texts import text_files

_CONTEXT = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(models.ModelOptions):
    """Measures a model's perplexity on texts, in windows of a context and a stride.

    A window of --context tokens moves on by --stride; of each window only the tokens
    that were not predicted before count. Shorter strides give more context and take
    longer.

    Attributes:
      model: the directory.
      text: plain text (.txt, .md); .jsonl or .parquet with a "text" in each line or
        row, or "messages", which the model's chat template writes; or .npy of int32
        token ids (sequences, length), whose rows are evaluated as they are.
      context: tokens of a window, BOS included; the model's context where that is less.
      stride: how far a window moves on, at most --context. A window predicts
        --context - 1 tokens; it moves on as far as that if left out.
      limit: how many windows of each text are evaluated, from its beginning; all if
        left out.
      batch: how many windows the model sees at once.
    """

    EXAMPLE: ClassVar = "jaxprune eval MODEL --text prose.txt code.jsonl"

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    context: int = _CONTEXT
    stride: int | None = None
    limit: int | None = None
    batch: int = 4

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Measures the model; the results by text."""
        parse.check_at_least_one(limit=self.limit, batch=self.batch)
        if self.context < 2:
            raise ValueError(f"--context must be at least 2 tokens, got {self.context}")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise ValueError(
                "--stride must be 1 <= stride <= context, got --stride "
                f"{self.stride} and --context {self.context}"
            )
        text_files.check_text_files(self.text)
        model = models.find(self.model, self)
        tokenizer = needed_tokenizer(self.model, self.text)
        begins = models.beginning(tokenizer, self, model.config.vocab_size)
        tokenizer = models.as_begun(tokenizer, begins)
        models.say_ignored(model, console)
        paths = tuple(dict.fromkeys(self.text))
        files = [
            text_files.read_text(p, tokenizer, model.config.vocab_size) for p in paths
        ]
        context = self.context
        if context == _CONTEXT > model.config.context:
            context = model.config.context
        seen = {
            name: perplexity.windows_of_text(
                file,
                context=context,
                stride=self.stride,
                bos=begins.token,
                limit=self.limit,
                longest=model.config.context,
            )
            for name, file in zip(named(paths), files, strict=True)
        }
        measured = measure(model.read(), seen, self.batch)
        found = {
            name: described(seen[name]) | {"sha256": file.sha256} | measured[name]
            for name, file in zip(seen, files, strict=True)
        }
        console.say(table(found))
        console.say(f"sequences begin with {begins.why}")
        return {"model": str(self.model), "bos": begins.why, "texts": found} | {
            "ignored_config": model.ignored
        }


def needed_tokenizer(model: Path, files: tuple[Path, ...]) -> hf.Tokenizer | None:
    """The model's tokenizer, or None where all files hold token ids."""
    return None if all(map(text_files.is_ids, files)) else hf.load_tokenizer(model)


def named(paths: tuple[Path, ...]) -> list[str]:
    """A name for each file: its own, or its path where two have one name."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def measure(
    model: models.Model, seen: dict[str, perplexity.Windows], batch: int
) -> dict[str, dict[str, Any]]:
    """The perplexity on each text by name, `measure_perplexity`'s, with a bar."""
    total = sum(len(own.tokens) for own in seen.values())
    decoder = model.decoder()
    with Progress(total, "evaluating", unit="window", leave=False) as progress:
        return {
            name: perplexity.measure_perplexity(
                decoder, own, batch=batch, progress=progress.update
            )
            for name, own in seen.items()
        }


def described(seen: perplexity.Windows) -> dict[str, Any]:
    """How a text is evaluated, and what guessing by frequency would give."""
    return {**seen.facts, "by_frequency": perplexity.unigram_perplexity(seen)}


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
    return columns([[*header, "by frequency"], *rows], right=True)


def by_stage(record: dict[str, Any]) -> str:
    """The perplexity of a record at each stage, for people."""
    stages = measured(record)
    rows = [
        [name, *(number(of[stage]["perplexity"]) for stage in stages)]
        for name, of in record["perplexity"].items()
    ]
    return columns([["perplexity", *stages], *rows], right=True)


def number(value: float | None) -> str:
    """A perplexity in five digits."""
    return "not finite" if value is None else f"{value:.5g}"
