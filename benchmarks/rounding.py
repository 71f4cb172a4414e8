"""A low-discrepancy sequence keeps the errors of many roundings from adding up.

The averages of a GPT's weights, followed through a whole training run in two bytes and
one, rounded by the sequence, by fresh random numbers and to the nearest; held as they
are, or as the lag d = A - w behind the weights. Then a drift: an average of zeros that
began at one, over four time constants.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from scipy import stats

import jaxprune as jp
from benchmarks import measure
from experiments import gpt
from experiments.datasets import Batches, load
from experiments.harness.optimizer import optimizer, schedule
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays import low_bit

CODES = ("bfloat16", "int8")
ROUNDINGS = ("sequence", "random", "nearest")
FORMS = ("average", "lag")
DECAY, STEPS = 0.999, 4000


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares ways to round on a training run.

    Attributes:
      preset: the GPT's size.
      steps: updates, with a snapshot at each.
      batch_size: sequences in a batch.
      seed: seed of the run.
      data: name of the data set.
      data_dir: where data sets are prepared; TFDS's own place by default.
    """

    preset: str = "cpu"
    steps: int = 2000
    batch_size: int = 12
    seed: int = 0
    data: str = "shakespeare_plays"
    data_dir: Path | None = None


def main(config: Config) -> None:
    """Prints one JSON line."""
    exact, averages_by_way, final = _followed(config)
    rows = {}
    for (code, rounding, form), averages in averages_by_way.items():
        # A = w + d: the lag is added to the final weights.
        flat = _flat(averages) + (_flat(final) if form == "lag" else 0)
        error = np.sqrt(np.mean((flat - exact) ** 2) / np.mean(exact**2))
        rows[f"{code} {rounding} {form}"] = {
            "rank_correlation": float(stats.spearmanr(abs(flat), abs(exact))[0]),
            "relative_error": float(error),
        }
    measure.report(
        "rounding",
        config=dataclasses.asdict(config) | {"data_dir": None},
        rows=rows,
        drift={f"{c} {r}": _drift(c, r) for c in CODES for r in ROUNDINGS},
    )


def _followed(config: Config) -> tuple[np.ndarray, dict[Any, Any], Any]:
    """The exact averages, those held in each way, and the final weights."""
    corpus = load(config.data, data_dir=config.data_dir)
    size = len(corpus.vocabulary)
    shape = gpt.GPTConfig(vocab_size=size, **gpt.PRESETS[config.preset])
    model = LanguageModel(shape)
    adamw = optimizer(schedule(1e-3, config.steps, warmup=100), track=())
    # The weight of a new value in the average at step n, as `track_importance` has it.
    gain = jp.weightings.power(0.5)
    ways = [(c, r, f) for c in CODES for r in ROUNDINGS for f in FORMS]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, averages: Any, batch: Any, n: jax.Array) -> Any:
        gradients = jax.grad(model.loss)(params, *batch, jax.random.key(0))
        updates, state = adamw.update(gradients, state, params)
        after = optax.apply_updates(params, updates)
        new = {
            way: [
                _rounded(_moved(old, w, u, gain(n), way[2]), n, way, number)
                for number, (old, w, u) in enumerate(
                    zip(
                        averages[way], _prunable(after), _prunable(updates), strict=True
                    )
                )
            ]
            for way in averages
        }
        return after, state, new

    params = model.init(config.seed)
    first = {"average": jnp.copy, "lag": jnp.zeros_like}
    averages = {
        way: [first[way[2]](w) for w in _prunable(params)]
        # The exact average goes through the same program, so only rounding differs.
        for way in [("float32", "exact", "average"), *ways]
    }
    state = adamw.init(params)
    batches = Batches(corpus.train, config.batch_size, shape.context, config.seed)
    for n in measure.progress(range(config.steps), "training"):
        params, state, averages = step(
            params, state, averages, batches(n), jnp.int32(n + 1)
        )
    exact = _flat(averages.pop(("float32", "exact", "average")))
    return exact, averages, _prunable(params)


def _moved(
    old: jax.Array, w: jax.Array, update: jax.Array, gain: jax.Array, form: str
) -> jax.Array:
    if form == "lag":
        # d' = A' - w' with A' = A + gain (w' - A) and w' = w + update.
        return (1 - gain) * (old - update)
    return old + gain * (w - old)


def _rounded(
    values: jax.Array, n: jax.Array, way: tuple[str, str, str], number: int
) -> jax.Array:
    """The values as they would be read back; the unit of a byte is fitted each time."""
    code, rounding, _ = way
    if code == "float32":
        return values
    if rounding == "sequence":
        thresholds = low_bit.dither(values.shape, low_bit.phase(number), n)
    elif rounding == "random":
        key = jax.random.fold_in(jax.random.key(number), n)
        thresholds = jax.random.bits(key, values.shape)
    else:
        # Half of 2^32: what is above the middle of two codes is rounded up.
        thresholds = jnp.full(values.shape, 1 << 31, jnp.uint32)
    if code == "bfloat16":
        return low_bit.decode(low_bit.encode_bfloat16(values, thresholds))
    exponent = low_bit.unit_exponent(values, signed=True)
    return low_bit.decode(
        low_bit.encode_int8(values, exponent, thresholds, signed=True)
    )


def _drift(code: str, rounding: str) -> dict[str, float]:
    """Mean and spread over 4096 positions of what is left, over what should be."""

    def body(n: jax.Array, values: jax.Array) -> jax.Array:
        return _rounded(DECAY * values, n, (code, rounding, ""), 0)

    averages = jax.lax.fori_loop(0, STEPS, body, jnp.ones(4096))  # (positions,)
    ratio = np.asarray(averages, np.float64) / DECAY**STEPS  # 1 where no error added up
    return {"mean": float(ratio.mean()), "deviation": float(ratio.std())}


def _prunable(tree: Any) -> list[jax.Array]:
    leaves = jp.tree.named_leaves(tree)
    return [leaf for name, leaf in leaves.items() if jp.tree.prunable(name, leaf)]


def _flat(leaves: list[jax.Array]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


if __name__ == "__main__":
    main(tyro.cli(Config))
