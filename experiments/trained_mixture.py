"""What does a trained mixture lose without experts, without weights in them, and both?

    python -m experiments.trained_mixture --out results/trained_mixture

A small mixture of the shape of Qwen 3 MoE is trained on characters, and a dense model
with as many weights. Experts go by REAP, by how often the router asks for them, and at
random; weights inside experts go by each method of `jaxprune prune`, with its settings;
then both. Where half of the experts or most of their weights are gone, the rest is
distilled from the whole mixture, zeros and sizes held. The models are directories that
the command takes: seed-N/mixture and seed-N/dense. Every cell is one small file, so a
run that was stopped continues.
"""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from experiments.datasets import Batches, Corpus, load
from experiments.harness import records, runner
from experiments.harness.option_rules import at_least, check_lists, check_names
from experiments.harness.stages import once
from experiments.report import mixture_table, tables
from experiments.tasks import expert_mixture
from experiments.tasks.expert_mixture import MixtureShape
from jaxprune.arrays import rules
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.jobs import passes
from jaxprune.lm.jobs.recovery import recover
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import Calibration
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.loaded_model import LoadedModel, open_model
from jaxprune.lm.recovery import retrain
from jaxprune.lm.shrinking.expert_scores import expert_scores
from jaxprune.lm.shrinking.units import keep_best_experts, without_experts

MODELS = ("mixture", "dense")
RANKINGS = ("reap", "frequency", "random")
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
_AT_ONCE = 16
"""Calibration sequences of a batch: all batches have one shape, so one program."""
_RECOVERED_FROM = {"experts": 0.5, "sparsity": 0.75}
"""Share that is gone from which on what is left is trained on: less costs little."""
_RULES = (
    *(
        at_least(name, 1)
        for name in ("steps", "recover_steps", "batch", "windows", "sequences")
    ),
    rules.Rule(
        lambda v: not v.sequences % min(v.sequences, _AT_ONCE),
        f"sequences must be a multiple of {_AT_ONCE}, or fewer, got {{sequences}}",
    ),
    rules.Rule(
        lambda v: (
            min(v.experts) > 0
            and round((1 - max(v.experts)) * v.shape.experts)
            >= v.shape.experts_per_token
        ),
        "experts must leave as many as a token is given to, and not all, got {experts}",
    ),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One smaller or pruned model.

    Attributes:
      seed: seed of the trained model.
      model: a name of `MODELS`.
      ranking: what chose the experts that go, of `RANKINGS`; "" where all stay.
      experts: share of the experts of each layer that goes.
      method: what prunes the matrices of the experts that stay; "" for nothing.
      sparsity: share of their weights that goes.
    """

    seed: int
    model: str
    ranking: str = ""
    experts: float = 0.0
    method: str = ""
    sparsity: float = 0.0

    @property
    def removed(self) -> float:
        """Share of the weights of all experts, or of all MLPs, that is gone."""
        return 1 - (1 - self.experts) * (1 - self.sparsity)

    @property
    def recovers(self) -> bool:
        """Whether it is trained on: a mixture that lost much."""
        shares = _RECOVERED_FROM.items()
        loses_much = any(getattr(self, name) >= share for name, share in shares)
        return self.model == "mixture" and loses_much

    def path(self, out: Path) -> Path:
        """Its file below the run's directory."""
        experts = f"-{self.ranking}-{self.experts:g}" if self.ranking else ""
        weights = f"-{self.method}-{self.sparsity:g}" if self.method else ""
        name = f"{self.model}{experts}{weights}.json"
        return out / f"seed-{self.seed}" / "cells" / name


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains mixtures and dense models, removes parts of them, lets them recover.

    Attributes:
      out: directory of the results; what is found there is not done again.
      text: a text file, or a directory of them, in place of Shakespeare's plays.
      seeds: a model of each kind for each.
      models: kinds of models: mixture, and dense, of as many weights.
      rankings: what chooses the experts that go: reap, frequency, random.
      experts: shares of the experts of each layer to remove.
      methods: what prunes inside experts: magnitude, wanda, sparsegpt, alps.
      sparsities: shares of the weights inside experts to remove.
      steps: number of steps of each training.
      recover_steps: number of steps after the removal.
      batch: sequences of a step.
      sequences: calibration sequences, of the model's context each.
      windows: number of windows of the validation text that are evaluated.
      shape: sizes of the mixture.
      smoke: every part at a size that ends within a minute.
    """

    out: Path = Path("results/trained_mixture")
    text: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[str, ...] = MODELS
    rankings: tuple[str, ...] = RANKINGS
    experts: tuple[float, ...] = (0.25, 0.5, 0.75)
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = (0.5, 0.75)
    steps: int = 1200
    recover_steps: int = 60
    batch: int = 8
    sequences: int = 128
    windows: int = 256
    shape: MixtureShape = dataclasses.field(default_factory=MixtureShape)
    smoke: bool = False

    def smaller(self) -> "Config":
        """The same at the size of `--smoke`."""
        return dataclasses.replace(
            self,
            seeds=self.seeds[:1],
            rankings=self.rankings[:1],
            experts=(0.5,),
            methods=self.methods[:1],
            sparsities=self.sparsities[:1],
            steps=4,
            recover_steps=2,
            batch=2,
            sequences=8,
            windows=8,
            shape=MixtureShape(
                layers=1, width=16, experts=4, experts_per_token=2, neurons=8
            ),
        )

    def check(self) -> None:
        """Refuses what could only fail later.

        Raises:
          ValueError: a name is unknown, a number out of range, or a list empty.
        """
        known = {"models": MODELS, "rankings": RANKINGS, "methods": METHODS}
        check_names(self, known)
        check_lists(self, "seeds", "experts", "sparsities", *known)
        rules.check(_RULES, **vars(self))

    def cells(self, seed: int) -> Iterator[Cell]:
        """All of a seed, in the order in which they are done."""
        for model in self.models:
            yield Cell(seed, model)
            for method, sparsity in itertools.product(self.methods, self.sparsities):
                yield Cell(seed, model, method=method, sparsity=sparsity)
            if model == "mixture":
                yield from self._cells_without_experts(seed)

    def _cells_without_experts(self, seed: int) -> Iterator[Cell]:
        for ranking, share in itertools.product(self.rankings, self.experts):
            yield Cell(seed, "mixture", ranking, share)
        # Both: half of the experts, and half of the weights of those that stay.
        for method in self.methods if 0.5 in self.sparsities else ():
            yield Cell(seed, "mixture", self.rankings[0], 0.5, method, 0.5)


class Run:
    """What the cells of one configuration have in common."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        """Prepares the texts; trains nothing."""
        self.config, self.corpus = config, corpus
        context = config.shape.context
        # Whole windows: what is behind the last one is dropped. (sequences, context):
        # the last token of each is a target alone.
        length = len(corpus.train) // context * context
        self.sequences = corpus.train[:length].reshape(-1, context).astype(np.int32)
        self.windows = perplexity.slide(
            corpus.validation.astype(np.int32), context=context, limit=config.windows
        )

    def identity(self) -> dict[str, Any]:
        """What must be the same for cells to lie in one directory; JSON-able."""
        names = ("steps", "recover_steps", "batch", "sequences", "windows", "smoke")
        return {
            "data": self.corpus.name,
            "fingerprint": self.corpus.fingerprint,
            **{name: getattr(self.config, name) for name in names},
            **dataclasses.asdict(self.config.shape),
        }

    def trained(self, seed: int, name: str) -> LoadedModel:
        """The mixture or the dense model of a seed, read from its directory."""
        place = self.config.out / f"seed-{seed}" / name
        dense = name == "dense"
        expert_mixture.train_directory(
            place,
            self.config.shape.config_json(len(self.corpus.vocabulary), dense=dense),
            self.corpus.vocabulary,
            self.sequences,
            retrain.Settings(
                steps=self.config.steps,
                learning_rate=2e-3,
                batch=self.config.batch,
                seed=seed,
            ),
            # The weight of Switch and OLMoE.
            None if dense else expert_mixture.balanced_loss(0.01),
        )
        return open_model(place).read()

    def calibration(self, seed: int) -> list[np.ndarray]:
        """Batches of the training text, int32 (batch, context)."""
        size = min(self.config.sequences, _AT_ONCE)
        # The text that is trained on, cut at other places.
        draw = Batches(self.corpus.train, size, self.config.shape.context, 2**32 + seed)
        return [draw(step)[0] for step in range(self.config.sequences // size)]

    def routing(self, seed: int) -> dict[str, Any]:
        """REAP's scores and the tokens of each expert, (layers, experts) both."""

        def measure() -> dict[str, Any]:
            model, tokens = self.trained(seed, "mixture"), self.calibration(seed)
            scores, counts = expert_scores(
                model.graphdef, model.params, np.concatenate(tokens), batch=_AT_ONCE
            )
            return {"scores": scores.tolist(), "tokens": counts.tolist()}

        return dict(once(self.config.out / f"seed-{seed}" / "routing.json", measure))

    def without_experts(self, cell: Cell, model: LoadedModel) -> LoadedModel:
        """The mixture without the experts of a cell."""
        if cell.ranking == "reap":
            tokens = np.concatenate(self.calibration(cell.seed))
            return without_experts(model, tokens, cell.experts, batch=_AT_ONCE)[0]
        if cell.ranking == "frequency":
            scores = np.array(self.routing(cell.seed)["tokens"])
        else:
            draw = np.random.default_rng(cell.seed)
            scores = draw.random((model.config.layers, model.config.experts))
        return keep_best_experts(model, scores, cell.experts)[0]

    def pruned(self, cell: Cell, model: LoadedModel) -> LoadedModel:
        """The model with zeros inside its experts, or inside its MLPs."""
        result = jp.prune_trained(
            functools.partial(_final_states, model.graphdef),
            model.params,
            self.calibration(cell.seed),
            passes.choose_method(cell.method),  # with the settings of the command
            sparsity=cell.sparsity,
            prunable=lambda name, leaf: _inside_mlp(name),
            progress=False,
        )
        return model._replace(params=result.params)

    def recovered(
        self, cell: Cell, model: LoadedModel, teacher: LoadedModel
    ) -> LoadedModel:
        """The model after some steps of distillation, its zeros held."""
        work = cell.path(self.config.out).with_suffix(".work")
        trained, *_ = recover(
            Recovery(
                recover_steps=self.config.recover_steps,
                recover_learning_rate=5e-4,
                recover_top=0,  # few of the sequences are trained on
            ),
            # Another order of the text than the training's, the same for all cells.
            Calibration(batch=self.config.batch, seed=cell.seed + 1000),
            self.sequences,
            model=model,
            teacher=teacher.decoder,
            matrices=set(),  # all parameters are trained, whatever was pruned
            work=work,
        )
        shutil.rmtree(work)
        return trained

    def loss(self, model: LoadedModel) -> float:
        """Nats per token of the validation text."""
        decoder = model.decoder()
        return float(
            perplexity.measure_perplexity(decoder, self.windows, batch=64)["nats"]
        )

    def measured(self, cell: Cell, unpruned: LoadedModel) -> dict[str, Any]:
        """What the file of a cell holds."""
        model = self.without_experts(cell, unpruned) if cell.ranking else unpruned
        if cell.method:
            model = self.pruned(cell, model)
        losses = {"loss": self.loss(model), "recovered": None}
        if cell.recovers:
            losses["recovered"] = self.loss(self.recovered(cell, model, unpruned))
        return {**dataclasses.asdict(cell), "removed": cell.removed, **losses}


def _inside_mlp(name: str) -> bool:
    """Whether a leaf is a matrix of experts, or of a dense model's MLP."""
    *_, part, matrix, _ = f"//{name}".split("/")
    return part == "mlp" and matrix in ("gate", "up", "down")


def _final_states(graphdef: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """The final states (batch, length, width): all that is pruned is before them."""
    model = nnx.merge(graphdef, params)
    return model.states(model.embed(tokens))[0]


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
    """
    smaller = config.smaller() if config.smoke else config
    smaller.check()
    run = Run(smaller, load(text=config.text))

    def show(results: dict[str, Any], out: Path) -> str:
        return tables.write(results, out, mixture_table.report(results))

    return runner.run(
        "trained_mixture",
        config,
        run.identity(),
        lambda: _cells(run),
        show,
        grows=True,
    )


def _cells(run: Run) -> dict[str, Any]:
    """Does those cells that are not in the directory; returns all that are."""
    out = run.config.out
    requested = [cell for seed in run.config.seeds for cell in run.config.cells(seed)]
    missing = [cell for cell in requested if not cell.path(out).exists()]
    with Progress(len(missing), "run", unit="cell") as progress:
        # Cells of a model lie together, so that it is read once.
        for (seed, name), cells in itertools.groupby(
            missing, lambda cell: (cell.seed, cell.model)
        ):
            model = run.trained(seed, name)
            for cell in cells:
                content = run.measured(cell, model)
                records.write_json(cell.path(out), content)
                progress.update()
    for seed in run.config.seeds if "mixture" in run.config.models else ():
        run.routing(seed)  # also where no ranking asked for it
    routing = {
        path.parent.name.removeprefix("seed-"): json.loads(path.read_text())
        for path in sorted(out.glob("seed-*/routing.json"))
    }
    paths = sorted(out.glob("seed-*/cells/*.json"))
    return {"routing": routing, "cells": [json.loads(p.read_text()) for p in paths]}


if __name__ == "__main__":
    runner.from_command_line(main, Config)
