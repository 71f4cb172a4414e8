"""Does a smaller or pruned model recover faster after the dense one than on the text?

    python -m experiments.recovery --out results/recovery

A small GPT is trained on characters. Then half of its neurons are removed, or most of
its weights are pruned, by magnitude. What is left is trained for as many steps in two
ways: by the cross entropy of the text, and by the KL divergence from the dense model.
The controls are a model of the smaller shape from scratch, with both losses, and the
dense model trained on. Each has the best of the same learning rates. Every cell is one
small file, so a run that was stopped continues.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from experiments.datasets import load
from jaxprune.arrays.console_progress import Progress
from jaxprune.evaluation import distill, machine, perplexity, retrain
from jaxprune.formats import atomic
from jaxprune.models import hf
from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.decoder.model import Decoder
from jaxprune.models.decoder.rope import linear

STARTS = ("dense", "half of the neurons", "pruned", "scratch at half of the neurons")
_CONTEXT = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training after something was removed.

    Attributes:
      seed: of the dense model and of the order of the text.
      start: one of `STARTS`.
      loss: "text" or "teacher".
      learning_rate: of the first step.
    """

    seed: int
    start: str
    loss: str
    learning_rate: float

    @property
    def file(self) -> str:
        """Its file in the directory of the results."""
        words = self.start.replace(" ", "-")
        return f"{words}-{self.loss}-{self.learning_rate:g}-seed-{self.seed}.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a GPT, removes parts of it, and lets what is left recover.

    Attributes:
      out: directory of the results; what is found there is not done again.
      text: a text file, or a directory of them, in place of Shakespeare's plays.
      seeds: one dense model each.
      width: of the model.
      dense_steps: of the dense model's training.
      steps: of each recovery.
      rates: learning rates that each recovery has the best of.
      batch: sequences of a step.
      sparsity: of the pruned model.
      windows: of the validation text that are evaluated.
    """

    out: Path = Path("results/recovery")
    text: Path | None = None
    seeds: tuple[int, ...] = (0, 1)
    width: int = 48
    dense_steps: int = 1500
    steps: int = 200
    rates: tuple[float, ...] = (1e-3, 3e-3)
    batch: int = 8
    sparsity: float = 0.8
    windows: int = 256

    def cells(self, seed: int) -> list[Cell]:
        """All of a seed; the dense model is no teacher of itself."""
        return [
            Cell(seed, start, loss, rate)
            for start, loss, rate in itertools.product(
                STARTS, ("text", "teacher"), self.rates
            )
            if (start, loss) != ("dense", "teacher")
        ]


def main(config: Config) -> None:
    """Runs what is missing and prints the table."""
    config.out.mkdir(parents=True, exist_ok=True)
    corpus = load(text=config.text)
    vocab = len(corpus.vocabulary)
    whole = len(corpus.train) // (_CONTEXT + 1) * (_CONTEXT + 1)
    sequences = corpus.train[:whole].reshape(-1, _CONTEXT + 1).astype(np.int32)
    windows = perplexity.slide(
        corpus.validation.astype(np.int32), context=_CONTEXT + 1, limit=config.windows
    )
    for seed in config.seeds:
        missing = [c for c in config.cells(seed) if not (config.out / c.file).exists()]
        if missing:
            _run(config, missing, seed, _shape(config, vocab), sequences, windows)
    print(table(config))


def _shape(config: Config, vocab: int) -> DecoderConfig:
    width, heads = config.width, 4
    return DecoderConfig(
        vocab_size=vocab,
        context=_CONTEXT,
        layers=4,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=4 * width,
        gated=False,
        activation="gelu",
        ropes=(linear(1e4, width // heads),),
    )


def _run(
    config: Config,
    cells: list[Cell],
    seed: int,
    shape: DecoderConfig,
    sequences: np.ndarray,
    windows: perplexity.Windows,
) -> None:
    """Trains the dense model of a seed and does its cells."""
    with Progress(config.dense_steps, "training", leave=False) as progress:
        settings = retrain.Settings(
            steps=config.dense_steps, learning_rate=1e-3, batch=config.batch, seed=seed
        )
        dense, _ = retrain.retrain(
            Decoder(shape, rngs=nnx.Rngs(seed)),
            _names(shape),
            sequences,
            settings,
            masked=set(),
            tick=lambda steps, _: progress.update(steps),
        )
    starts = _starts(config, dense, seed)
    with Progress(len(cells), "recovering", unit="cell") as progress:
        for cell in cells:
            model = starts[cell.start]
            names = _names(model.config)
            found, losses = retrain.retrain(
                model,
                names,
                sequences,
                retrain.Settings(
                    steps=config.steps,
                    learning_rate=cell.learning_rate,
                    batch=config.batch,
                    seed=seed + 1000,
                ),
                loss=distill.from_teacher(dense) if cell.loss == "teacher" else None,
                masked=names if cell.start == "pruned" else set(),
            )
            result = {
                **dataclasses.asdict(cell),
                "steps": config.steps,
                "dense": perplexity.measure(dense, windows)["nats"],
                "before": perplexity.measure(model, windows)["nats"],
                "after": perplexity.measure(found, windows)["nats"],
                "last_loss": losses[-1],
                "device": machine.device(),
            }
            atomic.replace_json(config.out / cell.file, result)
            progress.note(f"{cell.start}, {cell.loss}: {result['after']:.4f}")
            progress.update()


def _names(shape: DecoderConfig) -> set[str]:
    return set(jp.tree.named_leaves(nnx.state(hf.abstract(shape), nnx.Param)))


def _starts(config: Config, dense: Decoder, seed: int) -> dict[str, Decoder]:
    """The models that recover, by `STARTS`."""
    graphdef, params = nnx.split(dense, nnx.Param)
    batch = jax.ShapeDtypeStruct((1, 8), np.int32)
    small = jp.shrink(
        functools.partial(_logits, graphdef),
        params,
        batch,
        jp.scores.magnitude(params),
        {"layers/*/mlp/down/*": 0.5},
    )
    shape = hf.resized(dense.config, small.params)
    narrow, _ = nnx.split(hf.abstract(shape), nnx.Param)
    pruned = jp.prune(params, jp.scores.magnitude(params), config.sparsity)
    models = (
        dense,
        nnx.merge(narrow, small.params),
        nnx.merge(graphdef, pruned),
        Decoder(shape, rngs=nnx.Rngs(seed + 2000)),
    )
    return dict(zip(STARTS, models, strict=True))


def _logits(graphdef: Any, params: Any, ids: Any) -> Any:
    return nnx.merge(graphdef, params)(ids)


def table(config: Config) -> str:
    """Markdown: mean and standard deviation over the seeds, each at its best rate."""
    found: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for cell in (cell for seed in config.seeds for cell in config.cells(seed)):
        result = json.loads((config.out / cell.file).read_text())
        rates = found.setdefault((cell.start, cell.loss), {})
        rates.setdefault(cell.learning_rate, []).append(result)
    lines = [
        f"| start | before | {config.steps} steps on the text | on the dense model |",
        "|---|---|---|---|",
    ]
    for start in STARTS:
        row = [start, _spread([r["before"] for r in _best(found[start, "text"])])]
        for loss in ("text", "teacher"):
            best = _best(found.get((start, loss), {}))
            row.append(_spread([r["after"] for r in best]))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _best(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of the learning rate whose mean is the lowest."""
    means = {r: statistics.mean(x["after"] for x in own) for r, own in rates.items()}
    return rates[min(means, key=lambda rate: means[rate])] if rates else []


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main(tyro.cli(Config))
