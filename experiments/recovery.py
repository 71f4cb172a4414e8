"""Does a smaller or pruned model recover faster by distillation than on the text?

    python -m experiments.recovery --out results/recovery

A small GPT is trained on characters. Then half of its neurons are removed, or most of
its weights are pruned, by magnitude. What is left is trained for as many steps in two
ways: by the cross entropy of the text, and by the KL divergence from the dense model.
The controls are a model of the smaller shape, trained from scratch with either loss,
and the dense model, trained for as many more steps. Each training is run with every
learning rate of the same list, and the best counts. Every cell is one small file, so a
run that was stopped continues.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from experiments.datasets import Corpus, load
from experiments.harness import records, runner
from experiments.harness.option_rules import at_least, check_lists
from experiments.report import findings, tables
from experiments.report.tables import Report, Table
from jaxprune.arrays import rules
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.rules import Rule
from jaxprune.lm.measure import machine, perplexity
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.decoder.rope import linear
from jaxprune.lm.recovery import distill, retrain

COLUMNS = (
    *("seed", "start", "loss", "learning_rate", "dense", "before", "after"),
    *("last_loss", "device"),
)
STARTS = ("dense", "half of the neurons", "pruned", "scratch at half of the neurons")
_CONTEXT = 64
_RULES = (
    *(
        at_least(name, 1)
        for name in ("width", "layers", "dense_steps", "steps", "batch", "windows")
    ),
    # Four heads, of an even number of features for the rope.
    Rule(
        lambda v: 0 < v.sparsity < 1 and not v.width % 8,
        "recovery needs a sparsity in (0, 1) and a width that 8 divides, got "
        "{sparsity} and {width}",
    ),
)
_RATE = Rule(lambda v: 0 < v.rate < math.inf, "rates must be over 0, got {rate}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training after something was removed.

    Attributes:
      seed: seed of the dense model and of the order of the text.
      start: one of `STARTS`.
      loss: "text" or "teacher".
      learning_rate: learning rate of the first step.
    """

    seed: int
    start: str
    loss: str
    learning_rate: float

    def path(self, out: Path) -> Path:
        """Its file below the run's directory."""
        words = self.start.replace(" ", "-")
        name = f"{words}-{self.loss}-{self.learning_rate:g}-seed-{self.seed}"
        return out / "cells" / f"{name}.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a GPT, removes parts of it, and lets what is left recover.

    Attributes:
      out: directory of the results; what is found there is not done again.
      text: a text file, or a directory of them, in place of Shakespeare's plays.
      seeds: one dense model each.
      width: width of the model.
      layers: number of layers of the model.
      dense_steps: number of steps of the dense model's training.
      steps: number of steps of each recovery.
      rates: learning rates that each recovery has the best of.
      batch: sequences of a step.
      sparsity: sparsity of the pruned model.
      windows: number of windows of the validation text that are evaluated.
    """

    out: Path = Path("results/recovery")
    text: Path | None = None
    seeds: tuple[int, ...] = (0, 1)
    width: int = 48
    layers: int = 4
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


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the directory holds another run, or a number is out of range.
      OSError: the directory cannot be written to, or another process runs there.
    """
    rules.check(_RULES, **vars(config))
    check_lists(config, "seeds", "rates")
    for rate in config.rates:
        rules.check([_RATE], rate=rate)
    corpus = load(text=config.text)
    fields = ("width", "layers", "dense_steps", "steps", "batch", "sparsity", "windows")
    identity = {name: getattr(config, name) for name in fields}
    identity |= {"data": corpus.name, "fingerprint": corpus.fingerprint}

    def show(results: dict[str, Any], out: Path) -> str:
        return tables.write(results, out, report(results))

    return runner.run(
        "recovery", config, identity, lambda: _cells(config, corpus), show, grows=True
    )


def _cells(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Does those cells that are not in the directory; returns all that are."""
    # Whole windows: what is behind the last one is dropped.
    length = len(corpus.train) // (_CONTEXT + 1) * (_CONTEXT + 1)
    # (sequences, context + 1): the last token of each is a target alone.
    sequences = corpus.train[:length].reshape(-1, _CONTEXT + 1).astype(np.int32)
    windows = perplexity.slide(
        corpus.validation.astype(np.int32), context=_CONTEXT + 1, limit=config.windows
    )
    shape = _shape(config, len(corpus.vocabulary))
    for seed in config.seeds:
        missing = [c for c in config.cells(seed) if not c.path(config.out).exists()]
        if missing:
            _run(config, missing, seed, shape, sequences, windows)
    paths = sorted(config.out.glob("cells/*.json"))
    return {"cells": [json.loads(path.read_text()) for path in paths]}


def _shape(config: Config, vocab: int) -> DecoderConfig:
    # A GPT of before gates and grouped queries, so that a neuron is one row and one
    # column.
    width, heads = config.width, 4
    return DecoderConfig(
        vocab_size=vocab,
        context=_CONTEXT,
        layers=config.layers,
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
    dense = _train_dense(config, seed, shape, sequences)
    starts = _starts(config, dense, seed)
    with Progress(len(cells), "recovering", unit="cell") as progress:
        for cell in cells:
            model = starts[cell.start]
            names = _names(model.config)
            recovered_model, losses = retrain.retrain(
                model,
                names,
                sequences,
                retrain.Settings(
                    steps=config.steps,
                    learning_rate=cell.learning_rate,
                    batch=config.batch,
                    # Another order of the text than the dense model's, the same for all
                    # cells of a seed.
                    seed=seed + 1000,
                ),
                loss=distill.from_teacher(dense) if cell.loss == "teacher" else None,
                # Zeros of a pruned model stay; where neurons were removed there are
                # none to hold.
                masked=names if cell.start == "pruned" else set(),
            )
            result = {
                **dataclasses.asdict(cell),
                "dense": perplexity.measure_perplexity(dense, windows)["nats"],
                "before": perplexity.measure_perplexity(model, windows)["nats"],
                "after": perplexity.measure_perplexity(recovered_model, windows)[
                    "nats"
                ],
                "last_loss": losses[-1],
                "device": machine.device(),
            }
            records.write_json(cell.path(config.out), result)
            progress.note(f"{cell.start}, {cell.loss}: {result['after']:.4f}")
            progress.update()


def _train_dense(
    config: Config, seed: int, shape: DecoderConfig, sequences: np.ndarray
) -> Decoder:
    """The dense model of a seed, trained on sequences (count, context + 1)."""
    settings = retrain.Settings(
        steps=config.dense_steps, learning_rate=1e-3, batch=config.batch, seed=seed
    )
    with Progress(config.dense_steps, "training", leave=False) as progress:
        dense, _ = retrain.retrain(
            Decoder(shape, rngs=nnx.Rngs(seed)),
            _names(shape),
            sequences,
            settings,
            # Dense: nothing is held at zero.
            masked=set(),
            progress=lambda steps, _: progress.update(steps),
        )
    return dense


def _names(shape: DecoderConfig) -> set[str]:
    return set(jp.tree.named_leaves(nnx.state(hf.abstract(shape), nnx.Param)))


def _starts(config: Config, dense: Decoder, seed: int) -> dict[str, Decoder]:
    """The models that recover, by `STARTS`."""
    graphdef, params = nnx.split(dense, nnx.Param)
    # Traced, not run: any few tokens show which axes go together.
    batch = jax.ShapeDtypeStruct((1, 8), np.int32)
    small = jp.shrink(
        functools.partial(_logits, graphdef),
        params,
        batch,
        jp.scores.magnitude(params),
        # The rows of `down` are neurons; the columns of `up` and its bias go along.
        {"layers/*/mlp/down/*": 0.5},
    )
    shape = hf.resized(dense.config, small.params)
    narrow, _ = nnx.split(hf.abstract(shape), nnx.Param)
    scores = jp.scores.magnitude(params)
    pruned = jp.prune(params, scores, config.sparsity, allocation="layer")
    models = (
        dense,
        nnx.merge(narrow, small.params),
        nnx.merge(graphdef, pruned),
        # Fresh weights of the smaller shape: what the removal is worth against starting
        # anew.
        Decoder(shape, rngs=nnx.Rngs(seed + 2000)),
    )
    return dict(zip(STARTS, models, strict=True))


def _logits(graphdef: Any, params: Any, ids: Any) -> Any:
    return nnx.merge(graphdef, params)(ids)


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown: means over the seeds, each at its best rate."""
    trainings: dict[tuple[str, str], dict[float, dict[int, Any]]] = {}
    for cell in results["cells"]:
        rates = trainings.setdefault((cell["start"], cell["loss"]), {})
        rates.setdefault(cell["learning_rate"], {})[cell["seed"]] = cell
    lines = []
    for start in STARTS:
        text, teacher = (
            _best(trainings.get((start, x), {})) for x in ("text", "teacher")
        )
        row = [start, findings.mean([cell["before"] for cell in text])]
        for best in (text, teacher):
            count = f" ({len(best)})" if best else ""
            row.append(findings.mean([cell["after"] for cell in best]) + count)
        lines.append(row)
    steps = results["config"]["steps"]
    header = ["start", "before", f"{steps} steps on the text", "on the dense model"]
    dense = {cell["seed"]: cell["dense"] for cell in results["cells"]}
    return Report(
        lead="Trained on after neurons or weights went, on the text or on the dense "
        "model's predictions: validation loss in nats per token",
        facts={
            "dense": findings.mean(list(dense.values())),
            "seeds": ", ".join(map(str, sorted(dense))),
        },
        tables=[Table(header, lines, "Each at its best learning rate (seeds)")],
        columns=COLUMNS,
        rows=[{name: cell[name] for name in COLUMNS} for cell in results["cells"]],
        figures={},
    )


def _best(rates: dict[float, dict[int, Any]]) -> list[dict[str, Any]]:
    """The cells of the learning rate whose mean is the lowest.

    Of several rates, over the seeds that all of them have.
    """
    if not rates:
        return []
    # A run that was stopped has some seeds of some rates; means over other seeds would
    # compare seeds and not rates.
    common = set.intersection(*(set(by_seed) for by_seed in rates.values()))
    means = {
        rate: statistics.mean(by_seed[seed]["after"] for seed in common or by_seed)
        for rate, by_seed in rates.items()
    }
    return list(rates[min(means, key=lambda rate: means[rate])].values())


if __name__ == "__main__":
    runner.from_command_line(main, Config)
