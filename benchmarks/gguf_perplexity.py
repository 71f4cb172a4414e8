"""The perplexity of exported models by llama.cpp, beside ours on the same windows.

`python -m benchmarks.gguf_perplexity MODEL... --texts FILE... --types f32 q8_0 q4_0`
exports each directory in each type, and gives llama.cpp the windows of `jaxprune eval`.
It needs the extra [gguf] and llama-cpp-python, which pip builds with a C++ compiler.
"""

import csv
import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Float, Int
from scipy.special import logsumexp

from jaxprune.files import atomic
from jaxprune.lm.export.gguf_file import GGUFType, export_gguf
from jaxprune.lm.jobs.opening import needed_tokenizer, text_beginning
from jaxprune.lm.jobs.settings import Loading
from jaxprune.lm.measure.perplexity import Windows, measure_perplexity, windows_of_text
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.texts import text_files


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures each model in each type on each text.

    Attributes:
      models: directories that `jaxprune export --gguf` takes.
      texts: plain texts.
      types: GGUF types of the matrices.
      context: tokens of a window.
      limit: windows of each text.
      table: the CSV.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    texts: tuple[Path, ...]
    types: tuple[GGUFType, ...] = ("f32", "q8_0", "q4_0")
    context: int = 512
    limit: int = 8
    table: Path = Path("gguf_perplexity.csv")


def main(config: Config) -> None:
    """Writes the table, a row at a time, and prints it."""
    names = [text.stem for text in config.texts]
    columns = ["model", "by", "megabytes", *names, "geometric_mean"]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    for row in _rows(config):
        writer.writerow(row)
        # An older table stays until there is a row.
        atomic.replace(config.table, table.getvalue().encode())
        print(json.dumps(row), flush=True)


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    """A row for each model and what runs it: the perplexity of each text."""
    for path in config.models:
        model = hf.load(path)
        windows = _windows(config, path, model.config)
        ours = {
            name: measure_perplexity(model.model, window)["perplexity"]
            for name, window in windows.items()
        }
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.model)))
        del model
        yield _row(path, "jaxprune", size, ours)
        for kind in config.types:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.gguf"
                exported = export_gguf(path, file, type=kind)
                by_llama = _llama_perplexities(file, windows, config.context)
                yield _row(path, f"llama.cpp, {kind}", exported.bytes, by_llama)


def _row(
    path: Path, runtime: str, size: int, perplexities: Mapping[str, float]
) -> dict[str, Any]:
    mean = math.exp(np.mean([math.log(value) for value in perplexities.values()]))
    return {
        "model": path.name,
        "by": runtime,
        "megabytes": round(size / 1e6, 1),
        **{name: round(value, 3) for name, value in perplexities.items()},
        "geometric_mean": round(mean, 3),
    }


def _windows(config: Config, path: Path, shape: DecoderConfig) -> dict[str, Windows]:
    """Name of each text to its windows, as `jaxprune eval` makes them."""
    tokenizer, begins = text_beginning(
        needed_tokenizer(path, config.texts), Loading(), shape.vocab_size
    )
    return {
        text.stem: windows_of_text(
            text_files.read_text(text, tokenizer, shape.vocab_size),
            context=config.context,
            bos=begins.token,
            limit=config.limit,
            longest=shape.context,
            tokenizer=tokenizer,
        )
        for text in config.texts
    }


def _llama_perplexities(
    file: Path, windows: Mapping[str, Windows], context: int
) -> dict[str, float]:
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=context, logits_all=True, verbose=False)
    return {
        name: math.exp(
            np.concatenate(
                [
                    _losses(llama, tokens)[counted]
                    for tokens, counted in zip(
                        window.tokens, window.counted, strict=True
                    )
                ]
            ).mean()
        )
        for name, window in windows.items()
    }


def _losses(
    llama: Any, tokens: Int[np.ndarray, " context"]
) -> Float[np.ndarray, " context-1"]:
    """The loss of each token but the first of a window."""
    llama.reset()
    llama.eval(tokens[:-1].tolist())
    logits = llama.scores[: len(tokens) - 1].astype(np.float64)  # (context - 1, vocab)
    chosen = np.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
    return logsumexp(logits, axis=1) - chosen


if __name__ == "__main__":
    main(tyro.cli(Config))
