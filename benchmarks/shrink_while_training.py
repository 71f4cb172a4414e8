"""A GPT whose MLPs shrink while it trains, beside dense training with as many steps.

`python -m benchmarks.shrink_while_training` trains a character GPT on Shakespeare's
plays. Every so many steps `jp.shrink` takes some neurons out, by the preconditioned
magnitude of the optimizer's own second moment, and cuts the optimizer's state alike;
training goes on with the smaller program. Beside it: dense to the end; dense to the end
and shrunk then; shrunk late, in one event with the rest of the steps behind it; and
half as wide from the start. Prints a Markdown table and one JSON line for all seeds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks import measure
from experiments import gpt
from experiments.datasets import shakespeare_plays
from experiments.datasets.batches import Batches
from experiments.harness import records
from experiments.harness.optimizer import optimizer, schedule
from experiments.tasks.language_model import LanguageModel

NEURONS = "*/mlp/*"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains each candidate once a seed.

    Attributes:
      preset: the GPT's size.
      steps: number of steps of each candidate.
      batch_size: sequences in a batch.
      begin: the share of the steps after which the first neurons go.
      end: the share after which the last go.
      late: the share after which all go at once, of the candidate that is shrunk late.
      times: number of events.
      sparsity: the share of each MLP's neurons that is gone in the end.
      seeds: seeds of initialisation and batches.
      validated: sequences of the validation loss.
      energy: measure energy with codecarbon, offline, of this country (ISO code, "DEU"
        say); it needs the extra "energy".
    """

    preset: str = "cpu"
    steps: int = 500
    batch_size: int = 16
    begin: float = 0.1
    end: float = 0.5
    late: float = 0.8
    times: int = 4
    sparsity: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)
    validated: int = 256
    energy: str | None = None


def main(config: Config) -> None:
    """Trains and reports."""
    plays = [shakespeare_plays.render(x) for x in shakespeare_plays.read_plays()]
    letters = sorted({*"".join(plays)})
    # (characters,): whole plays are held out, every tenth.
    train, held_out = (
        np.array([letters.index(x) for x in "".join(texts)], np.uint8)
        for texts in (
            [x for n, x in enumerate(plays) if n % 10 != 4],
            plays[4::10],
        )
    )
    shape = gpt.preset(config.preset, vocab_size=len(letters))
    points = np.linspace(config.begin, config.end, config.times)  # shares of the steps
    events = [round(config.steps * share) for share in points]
    candidates: dict[str, list[int]] = {
        "dense": [],
        "while it trains": events,
        "late": [round(config.late * config.steps)],
        "from the start": [0],
    }
    results: dict[str, list[dict[str, float]]] = {}
    # All candidates of a seed one after the other, so that the machine is alike for
    # them.
    runs = [(seed, name) for seed in config.seeds for name in candidates]
    for seed, name in measure.progress(runs, "training", "run"):
        results_of_run = trained(config, shape, train, held_out, seed, candidates[name])
        for key, value in results_of_run.items():
            label = "dense, shrunk after" if key == "after" else name
            results.setdefault(label, []).append(value)
    print(loss_table(results) + "\n")
    measure.report(
        "shrink_while_training", config=dataclasses.asdict(config), results=results
    )


def loss_table(results: dict[str, list[dict[str, float]]]) -> str:
    """A row a candidate: means over the seeds, the loss with its standard deviation."""
    rows = [["shrunk", "loss, nats", "steps, s", "the rest, s", "parameters"]]
    first = next(iter(results.values()))[0]
    if energy := "watt-hours" in first:
        rows[0].append("energy, Wh")
    for name, runs in results.items():
        nats = measure.mean_and_spread([run["nats"] for run in runs], ".3f")
        mean = {key: statistics.fmean(run[key] for run in runs) for key in first}
        row = [name, nats, f"{mean['seconds']:.1f}"]
        row += [f"{mean['rest']:.1f}", f"{mean['parameters']:,.0f}"]
        if energy:
            row.append(f"{mean['watt-hours']:.2f}")
        rows.append(row)
    return measure.markdown(rows)


def trained(
    config: Config,
    shape: gpt.GPTConfig,
    train: np.ndarray,
    held_out: np.ndarray,
    seed: int,
    events: list[int],
) -> dict[str, dict[str, float]]:
    """One run: loss, costs and size; of a dense one also as it is shrunk then.

    Its seconds are those of the steps; what making smaller programs and compiling takes
    is apart. Energy is of both.
    """
    model, batches = LanguageModel(shape), _batches(config, shape, train, seed)
    tx = optimizer(schedule(1e-3, config.steps, warmup=100), track=())

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss(params, *batch, jax.random.key(0))

    fn: Any = loss
    params = model.init(seed)
    state, first = tx.init(params), batches(0)
    step_seconds, removed, before = 0.0, 0, time.perf_counter()
    with records.measure("train", seed=seed, country=config.energy) as phase:
        for number in range(config.steps):
            if number in events:
                share, removed = _share(config, removed, len(events), 4 * shape.width)
                small = _shrunk(fn, params, state, first, share)
                fn, params, state = small.fn, small.params, small.cut(state)
            if number == 0 or number in events:
                # Ahead of time: compiling is in "the rest", and no step's seconds have
                # it.
                step = _step(fn, tx).lower(params, state, first).compile()
            batch = batches(number)
            started = time.perf_counter()
            # Waited for at each step, so that its seconds are those of the device.
            params, state = jax.block_until_ready(step(params, state, batch))
            step_seconds += time.perf_counter() - started
        elapsed = time.perf_counter() - before
    costs = {"seconds": step_seconds, "rest": elapsed - step_seconds}
    if phase.energy_kwh is not None:  # None without --energy
        costs["watt-hours"] = 1000 * phase.energy_kwh
    validation = _batches(config, shape, held_out, 0)
    results = {"run": {**_measured(config, fn, params, validation), **costs}}
    if not events:
        started = time.perf_counter()
        small = _shrunk(fn, params, state, first, config.sparsity)
        jax.block_until_ready(small.params)
        # In the seconds, but not in the energy, whose meter has stopped.
        costs = {**costs, "rest": costs["rest"] + time.perf_counter() - started}
        results["after"] = {
            **_measured(config, small.fn, small.params, validation),
            **costs,
        }
    return results


def _shrunk(
    fn: Any, params: Any, state: Any, batch: Any, share: float
) -> jp.ShrinkResult:
    """Without the neurons whose weights have the lowest scores in sum."""
    # Before the first step there is no second moment to score by.
    fresh = all(not np.any(leaf) for leaf in jax.tree.leaves(state))
    criterion = jp.scores.magnitude(params)
    if not fresh:
        criterion = jp.scores.preconditioned_magnitude(params, state)
    return jp.shrink(fn, params, batch, criterion, {NEURONS: share})


def _share(
    config: Config, removed_before: int, events: int, neurons: int
) -> tuple[float, int]:
    """What an event takes of the neurons that are left, and how many are gone then."""
    removed = round(config.sparsity * neurons / events)
    return removed / (neurons - removed_before), removed_before + removed


def _step(fn: Callable[..., Any], tx: Any) -> Any:
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def _batches(
    config: Config, shape: gpt.GPTConfig, tokens: np.ndarray, seed: int
) -> Batches:
    return Batches(
        tokens, batch_size=config.batch_size, context=shape.context, seed=seed
    )


def _measured(
    config: Config, fn: Any, params: Any, batches: Batches
) -> dict[str, float]:
    loss, count = jax.jit(fn), config.validated // config.batch_size
    # Drawn like training batches: the same windows for all candidates.
    losses = [float(loss(params, batches(number))) for number in range(count)]
    return {
        "nats": float(np.mean(losses)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
