"""Train a small GPT, watch every weight, prune by what was seen, retrain, show it.

    python -m experiments.scaled_down_llm --out results/first

The paper's first experiment. Started again with the same flags, a run continues where
it was; a finished one says so. What it writes is described in experiments/README.md.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jaxprune as jp
from experiments import gpt
from experiments.datasets import Corpus, load
from experiments.harness import device_mesh, runner
from experiments.harness.plan import Plan
from experiments.tasks.language_model import LanguageModel
from experiments.tasks.language_task import LanguageTask
from jaxprune.arrays import processes
from jaxprune.files import atomic

# nanoGPT's batch, steps and peak for "char", and its peak for "gpt2".
_BATCH = {"cpu": 12, "medium": 16, "char": 64, "gpt2": 32}
_STEPS = {"cpu": 1000, "medium": 900, "char": 5000, "gpt2": 20_000}
_RATE = {"cpu": 1e-3, "medium": 1e-3, "char": 1e-3, "gpt2": 6e-4}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small GPT with tracking, prunes it by several criteria, retrains it.

    Attributes:
      out: directory of the results; a run found there continues.
      preset: size of the model; "char" and "gpt2" are for GPU or TPU.
      data: "shakespeare_plays" (offline) or "tiny_shakespeare_char" (downloaded once).
      text: a text file, or a directory of them, in place of a data set.
      data_dir: where data sets are kept; TFDS's default if left out.
      seeds: one training run each.
      criteria: what to prune by; see experiments/harness/criteria.py.
      retrain_criteria: those retrained too; all of `criteria` if left out.
      allocations: "global" ranks all matrices together, "layer" each alone; the first
        one is retrained.
      sparsities: fractions of the decoder's matrices to remove.
      retrain_sparsities: those retrained at; all of `sparsities` if left out.
      batch_size: sequences in a batch; the preset's if left out.
      steps: steps of training; the preset's if left out.
      retrain_steps: steps after pruning, and of the dense control; 0 for neither.
      learning_rate: peak; the preset's if left out.
      retrain_learning_rate: peak of the steps after pruning; that of training if left
        out.
      eval_tokens: validation tokens of every loss; 0 takes all.
      show_sparsity: where samples, layers and single weights are shown.
      sample_length: characters of a sample.
      dtype: type of the matrix products; parameters are float32.
      checkpoint_every: steps between checkpoints.
      energy: three-letter code of the country whose electricity counts, to measure
        energy and CO2 (needs the extra `energy`).
      mesh: how the devices share the work, "data=4,model=2" or "fsdp=8"; see
        experiments/harness/device_mesh.py. All that the batch can be split over if
        left out.
      distributed: one of several processes that make up the run, as the launcher says
        (Slurm, Open MPI, Kubernetes, Cloud TPU), with the same flags, on one directory.
      smoke: everything at a size that ends within a minute.
    """

    out: Path = Path("results/scaled_down_llm")
    preset: Literal["cpu", "medium", "char", "gpt2"] = "cpu"
    data: str = "shakespeare_plays"
    text: Path | None = None
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1)
    criteria: tuple[str, ...] = (
        "preconditioned_magnitude",
        "averaged_weight",
        "magnitude",
    )
    retrain_criteria: tuple[str, ...] | None = None
    allocations: tuple[Literal["layer", "global"], ...] = ("global",)
    sparsities: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    retrain_sparsities: tuple[float, ...] | None = None
    batch_size: int | None = None
    steps: int | None = None
    retrain_steps: int = 100
    learning_rate: float | None = None
    retrain_learning_rate: float | None = None
    eval_tokens: int = 100_000
    show_sparsity: float = 0.8
    sample_length: int = 300
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 250
    energy: str | None = None
    mesh: str | None = None
    distributed: bool = False
    smoke: bool = False

    def plan(self) -> Plan:
        """The numbers of one seed, checked.

        Raises:
          ValueError: a criterion is unknown, or a number is out of range.
        """
        config = self.smaller() if self.smoke else self
        if not (config.eval_tokens >= 0 and config.sample_length >= 1):
            raise ValueError("eval_tokens must be >= 0 and sample_length >= 1")
        rate = config.learning_rate or _RATE[config.preset]
        return Plan.of(
            config,
            batch_size=config.batch_size or _BATCH[config.preset],
            steps=config.steps or _STEPS[config.preset],
            learning_rate=rate,
            retrain_learning_rate=config.retrain_learning_rate or rate,
            eval_tokens=config.eval_tokens or None,
            sample_length=config.sample_length,
        )

    def smaller(self) -> "Config":
        """The same at the size of `--smoke`."""
        return dataclasses.replace(
            self,
            seeds=self.seeds[:1],
            criteria=self.criteria[:3],
            retrain_criteria=None,
            sparsities=(0.5, 0.9),
            retrain_sparsities=None,
            batch_size=4,
            steps=40,
            retrain_steps=10,
            eval_tokens=4096,
            sample_length=60,
        )


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
      FloatingPointError: a loss is not finite.
    """
    plan = config.plan()
    # Before the first array: JAX must know the processes when it looks for devices.
    if config.distributed:
        processes.join()
    # Read once, so that all processes have the same text.
    corpus = processes.on_first(
        lambda: load(config.data, text=config.text, data_dir=config.data_dir)
    )
    identity = runner.identity_of(
        config,
        plan,
        data=corpus.name,
        fingerprint=corpus.fingerprint,
        vocabulary=len(corpus.vocabulary),
    )
    # One process with another flag would wait for the others without end.
    settings = {**identity, "out": str(config.out), "mesh": config.mesh}
    first = processes.on_first(lambda: json.loads(json.dumps(settings)))
    processes.together(lambda: _check_alike(first, settings))
    shape = gpt.preset(config.preset, vocab_size=_vocabulary(config, corpus))
    shape = dataclasses.replace(shape, dtype=config.dtype)
    task = LanguageTask(LanguageModel(shape), corpus)
    for seed in identity["seeds"]:  # refuses what is too short before it writes
        task.batches(plan.batch_size, seed)
    task.validation(1, 1)
    mesh = device_mesh.make_mesh(config.mesh, plan.batch_size)
    if mesh is not None:
        device_mesh.shardings(task.shapes, mesh)

    def more(seeds: list[dict[str, Any]]) -> dict[str, Any]:
        model = runner.described(task, jp.tree.prunable)
        # A loss that is not well under it is that of a model that learnt nothing.
        model["nats_by_frequency"] = corpus.nats_by_frequency
        # Exact counts from the shape; nothing is timed for them.
        flops = functools.partial(gpt.flops_per_token, shape)
        return {"model": model, "costs": runner.costs(seeds[0]["cells"], model, flops)}

    return runner.sweep("scaled_down_llm", config, plan, task, identity, mesh, more)


def _check_alike(first: dict[str, Any], settings: dict[str, Any]) -> None:
    if different := atomic.differences(first, settings):
        raise ValueError(
            f"all processes need the same flags, but {'; '.join(different)}"
        )


def _vocabulary(config: Config, corpus: Corpus) -> int:
    """The corpus's size, or GPT-2's own where its preset is to be kept whole."""
    size = len(corpus.vocabulary)
    return gpt.PRESETS[config.preset].get("vocab_size", size)


if __name__ == "__main__":
    runner.from_command_line(main, Config)
