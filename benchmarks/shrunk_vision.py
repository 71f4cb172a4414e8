"""Heads and neurons out of the trained Phi-3-vision: accuracy and seconds.

    python -m benchmarks.shrunk_vision --run results/vision --out results/shrunk_vision

Takes the finished seeds of `experiments.phi3_vision`. Shares of the heads and neurons
of the decoder, of the tower or of both are removed: by `jp.shrink` with the weights'
magnitude or the preconditioned magnitude of the run, or by `jp.shrink` with batches.
What is left is trained on as that run retrains what it pruned: as many steps, the same
rate and pictures. Every cell is one small file, so a run that was stopped continues.
Prints two Markdown tables and one JSON line.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks import measure
from experiments import phi3_vision
from experiments.datasets import prefetch, question_answers
from experiments.harness import run_dir, runner, training
from experiments.harness.criteria import Watched
from experiments.harness.optimizer import schedule
from experiments.harness.plan import Plan
from experiments.harness.seed_trainer import SeedTrainer
from experiments.tasks.picture_task import PictureTask
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic

Method = Literal["magnitude", "preconditioned_magnitude", "shrink_trained"]
Part = Literal["decoder", "tower", "all"]
GLOBS = {"decoder": ("decoder/*",), "tower": ("tower/*",)}
GLOBS["all"] = GLOBS["decoder"] + GLOBS["tower"]
_BATCH = 32  # pictures that are looked at together in calibration


@dataclasses.dataclass(frozen=True)
class Config:
    """Shrinks the models of a run of `experiments.phi3_vision`.

    Attributes:
      run: directory of that run.
      out: directory of the results; what is found there is not done again.
      data_dir: where the run's data set is kept; TFDS's default if left out.
      seeds: seeds of the run.
      parts: what loses units.
      methods: by which units are chosen.
      shares: of the heads and of the neurons that are removed in each layer.
      calibrated: pictures that `jp.shrink` sees as batches, a multiple of 32.
      timed: pictures of a timed forward.
      repeats: timed rounds.
    """

    run: Path = Path("results/phi3_vision")
    out: Path = Path("results/shrunk_vision")
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    parts: tuple[Part, ...] = ("all", "decoder", "tower")
    methods: tuple[Method, ...] = (
        "magnitude",
        "preconditioned_magnitude",
        "shrink_trained",
    )
    shares: tuple[float, ...] = (0.25, 0.5)
    calibrated: int = 512
    timed: int = 64
    repeats: int = 15


@dataclasses.dataclass(frozen=True)
class Cell:
    """One smaller model.

    Attributes:
      seed: seed of the run.
      part: name in `GLOBS`.
      share: share of the units that are gone.
      method: criterion that they were chosen by.
    """

    seed: int
    part: Part
    share: float
    method: Method

    @property
    def file(self) -> str:
        """Its file in the directory of the results."""
        return f"{self.part}-{self.share:g}-{self.method}-seed-{self.seed}.json"


def main(config: Config) -> None:
    """Runs what is missing, prints the tables.

    Raises:
      ValueError: `calibrated` does not fit, `run` holds no run, or `out` cells of
        another one.
      OSError: `out` cannot be written to, or another process writes there.
    """
    if config.calibrated < _BATCH or config.calibrated % _BATCH:
        raise ValueError(
            f"calibrated must be a multiple of {_BATCH}, which are one batch, got "
            f"{config.calibrated}"
        )
    # Refuses a directory that is no finished run before `out` is made.
    identity, plan, task = opened(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with run_dir.locked(config.out):
        run_dir.begun(config.out, {**identity, "calibrated": config.calibrated})
        requested = list(cells(config))
        missing = [cell for cell in requested if not (config.out / cell.file).exists()]
        with Progress(len(missing), "shrinking", unit="cell") as progress:
            # A seed's dense model is read once, for all of its cells.
            for seed in sorted({cell.seed for cell in missing}):
                dense = watched(config, identity, plan, task, seed)
                accuracy = {"dense": right(task, logits(task))(dense.params)}
                for cell in [cell for cell in missing if cell.seed == seed]:
                    progress.note(cell.file.removesuffix(".json"))
                    result = measured(config, plan, task, dense, cell)
                    atomic.replace_json(config.out / cell.file, accuracy | result)
                    progress.update()
    rows = [json.loads((config.out / cell.file).read_text()) for cell in requested]
    times = timed(config, task, watched(config, identity, plan, task, config.seeds[0]))
    print(f"{accuracies(config, rows)}\n\n{speeds(times)}\n")
    measure.report("shrunk_vision", cells=rows, milliseconds=times)


def opened(config: Config) -> tuple[dict[str, Any], Plan, PictureTask]:
    """The run's configuration as it was written, its plan and its task."""
    path = config.run / "config.json"
    if not path.exists():
        raise ValueError(
            f"--run {config.run} must be a directory of experiments.phi3_vision, but "
            f"'{path}' is missing; run that first"
        )
    identity = json.loads(path.read_text())
    fields = {field.name for field in dataclasses.fields(phi3_vision.Config)}
    fields_set = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in identity.items()
        if name in fields
    }
    config_of_run = phi3_vision.Config(
        **fields_set | {"out": config.run, "data_dir": config.data_dir}
    )
    task = phi3_vision.make_task(config_of_run)
    # Accuracies of other pictures would be compared with those that the run reports.
    pictures_digest = question_answers.fingerprint((*task.train, *task.held_out))
    if pictures_digest != identity["fingerprint"]:
        raise ValueError(
            f"--run {config.run} was of other pictures or questions; run it with the "
            "usual --held-out and --fields, and give the same --data-dir"
        )
    return identity, config_of_run.plan(), task


def cells(config: Config) -> Iterator[Cell]:
    """All cells, a seed's together."""
    for seed in config.seeds:
        for part in config.parts:
            for share in config.shares:
                yield from (Cell(seed, part, share, m) for m in config.methods)


def watched(
    config: Config,
    identity: dict[str, Any],
    plan: Plan,
    task: PictureTask,
    seed: int,
) -> Watched:
    """The trained parameters of a seed and what was tracked on the way to them."""
    directory = config.run / f"seed-{seed}"
    return SeedTrainer(seed, plan, task, directory, None, identity, None).watched()


def logits(task: PictureTask) -> Callable[[Any, Any], jax.Array]:
    """Parameters and inputs to logits (batch, time, vocabulary)."""

    def fn(params: Any, inputs: Any) -> jax.Array:
        states = task.model.states(params, inputs)
        return task.model.bind(params).decoder.logits(states)

    return fn


def shrunk(
    config: Config, task: PictureTask, dense: Watched, cell: Cell
) -> jp.ShrinkResult:
    """The model without a share of the heads and neurons of a part."""
    shares = dict.fromkeys(GLOBS[cell.part], cell.share)
    fn, params = logits(task), dense.params
    starts = range(0, config.calibrated, _BATCH)
    # Inputs alone; made when asked for, since pictures of all would fill the memory.
    batches = (task.packed(task.train[i : i + _BATCH])[0] for i in starts)
    if cell.method == "shrink_trained":
        calibration = list(batches)
        return jp.shrink(
            fn,
            params,
            calibration[0],
            sparsity=shares,
            batches=calibration,
            relative=True,
            progress=False,
        )
    scores = jp.scores.magnitude(params)
    if cell.method == "preconditioned_magnitude":
        scores = jp.scores.preconditioned_magnitude(params, dense.tracked)
    # By scores a batch is traced for its shapes, and never looked at.
    return jp.shrink(fn, params, next(batches), scores, shares)


def measured(
    config: Config, plan: Plan, task: PictureTask, dense: Watched, cell: Cell
) -> dict[str, Any]:
    """A cell's result: sizes, and accuracies before and after retraining."""
    small = shrunk(config, task, dense, cell)
    accuracy = right(task, small.fn)
    before = accuracy(small.params)
    return {
        **dataclasses.asdict(cell),
        "parameters": small.report["after"]["parameters"],
        "dense_parameters": small.report["before"]["parameters"],
        "before": before,
        "after": accuracy(retrained(plan, task, small, cell)),
    }


def right(task: PictureTask, fn: Callable[..., Any]) -> Callable[[Any], float]:
    """Parameters to the share of held-out questions that are answered right."""
    guess = jax.jit(lambda params, inputs: jnp.argmax(fn(params, inputs), -1))

    def accuracy(params: Any) -> float:
        count = 0
        for inputs, targets, weights in task.validation(64, None):
            matches = (np.asarray(guess(params, inputs)) == targets) | (weights == 0)
            # The last batch is filled with examples of weight 0: they are no questions.
            count += int(matches.all(1)[weights.any(1)].sum())
        return count / len(task.held_out)

    return accuracy


def retrained(plan: Plan, task: PictureTask, small: jp.ShrinkResult, cell: Cell) -> Any:
    """The smaller parameters after the steps that the run gives what it pruned."""
    steps, rate = plan.retrain_steps, plan.retrain_learning_rate
    # The schedule that `SeedTrainer.retrain` has.
    tx = task.optimizer(schedule(rate, steps, warmup=50), track=())

    def loss(params: Any, inputs: Any, targets: Any, key: Any) -> jax.Array:
        counted = targets >= 0  # (batch, time)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            small.fn(params, inputs), jnp.maximum(targets, 0)
        )
        return jnp.where(counted, losses, 0).sum() / counted.sum()

    batches = task.batches(plan.batch_size, cell.seed)
    return training.train(
        training.init(small.params, tx),
        training.make_step(loss, tx),
        # Behind the training batches, as the run's own retraining.
        lambda step: batches(plan.steps + step),
        steps=steps,
        key=jax.random.key(cell.seed),
        reports=training.Reports(label=cell.file.removesuffix(".json")),
        prefetch=prefetch,
    ).params


def timed(
    config: Config, task: PictureTask, dense: Watched
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward, the candidates in turn: medians with their spread."""
    inputs, *_ = task.packed(task.held_out[: config.timed])
    runs = {"0 dense": (logits(task), dense.params)}
    for part in config.parts:
        for share in config.shares:
            small = shrunk(config, task, dense, Cell(0, part, share, "magnitude"))
            runs[f"{share:g} {part}"] = (small.fn, small.params)

    def forward(fn: Any, params: Any) -> Callable[[], jax.Array]:
        compiled = jax.jit(fn)
        return lambda: compiled(params, inputs)

    times = measure.interleaved(
        {name: forward(*run) for name, run in runs.items()}, config.repeats
    )
    return {
        name: measure.median_and_spread([1e3 * second for second in seconds])
        for name, seconds in times.items()
    }


def accuracies(config: Config, rows: Sequence[dict[str, Any]]) -> str:
    """Percentage points below the dense model of the same seed, mean ± spread."""
    lines = [
        "| units out of | removed | by | parameters | at once | retrained |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells(dataclasses.replace(config, seeds=config.seeds[:1])):
        key = cell.part, cell.share, cell.method
        cells_of_seeds = [
            r for r in rows if (r["part"], r["share"], r["method"]) == key
        ]
        differences = [
            measure.mean_and_spread(
                [100 * (row[stage] - row["dense"]) for row in cells_of_seeds], "+.1f"
            )
            for stage in ("before", "after")
        ]
        size = cells_of_seeds[0]["parameters"] / cells_of_seeds[0]["dense_parameters"]
        lines.append(
            f"| {cell.part} | {cell.share:.0%} | `{cell.method}` | {size:.0%} | "
            f"{' | '.join(differences)} |"
        )
    return "\n".join(lines)


def speeds(times: dict[str, dict[str, float]]) -> str:
    """A row for each shape: milliseconds of a forward and how often faster."""
    lines = ["| units out of | removed | forward | faster |", "|---|---|---|---|"]
    dense = times["0 dense"]["median"]
    for name, milliseconds in times.items():
        share, part = name.split()
        forward = milliseconds["median"]
        lines.append(
            f"| {part} | {float(share):.0%} | {forward:.1f} ms | "
            f"{dense / forward:.2f} x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    runner.from_command_line(main, Config)
