"""Channels, neurons and heads out of a small CNN and a small ViT.

`python -m benchmarks.digits_structure` trains both on the 8 x 8 digits of scikit-learn,
the CNN in Linen, the ViT in NNX, and removes shares of all their units: by `jp.shrink`
with the weights' magnitude or with the preconditioned magnitude of the optimizer's own
state, and by `jp.shrink` with batches. The smaller program is trained on with the
optimizer's state cut alike. Beside it: dense, and built at the smaller shape, with as
many steps. Prints two Markdown tables and one JSON line.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from experiments.datasets import picture_questions

CHANNELS, DENSE = (16, 32, 32), 64
WIDTH, LAYERS, HEADS, FEATURES, NEURONS = 32, 3, 4, 8, 64  # of the ViT
METHODS = ("magnitude", "preconditioned_magnitude", "shrink_trained")


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains and shrinks each network once a seed.

    Attributes:
      networks: "cnn", "vit".
      shares: shares of the units of every group that are removed.
      steps: number of steps of training, before units go.
      retraining: steps after that.
      batch_size: images in a batch.
      learning_rate: of AdamW; falls along a cosine in training, and once more in
        retraining.
      seeds: of initialisation and batches.
      calibrated: images that `jp.shrink` looks at as batches.
      relative: whether each counts by its size there; the published table is without.
      timed: images of a timed forward.
      repeats: timed rounds.
    """

    networks: tuple[Literal["cnn", "vit"], ...] = ("cnn", "vit")
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    steps: int = 400
    retraining: int = 100
    batch_size: int = 64
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    calibrated: int = 512
    relative: bool = False
    timed: int = 512
    repeats: int = 15


class Data(NamedTuple):
    """Images (count, 8, 8) from 0 to 1 and labels (count,); the held-out are apart."""

    images: np.ndarray
    labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


class Run(NamedTuple):
    """A function of parameters and images to logits, and where its training is."""

    fn: Callable[[Any, Any], jax.Array]
    params: Any
    state: Any


class Convolutional(nn.Module):
    """Three convolutions, the last one with a stride, and two dense layers."""

    gone: float

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (batch, 8, 8) to logits (batch, 10)."""
        x = images[..., None]  # (batch, 8, 8, 1)
        for number, channels in enumerate(CHANNELS):
            stride = 2 if number == 2 else 1
            x = nn.relu(nn.Conv(kept_units(channels, self.gone), (3, 3), stride)(x))
        x = x.reshape(len(x), -1)  # (batch, 4 * 4 * channels)
        return nn.Dense(10)(nn.relu(nn.Dense(kept_units(DENSE, self.gone))(x)))


class Layer(nnx.Module):
    """Attention and an MLP beside a residual stream."""

    def __init__(self, gone: float, rngs: nnx.Rngs) -> None:
        heads, neurons = kept_units(HEADS, gone), kept_units(NEURONS, gone)
        self.attention = nnx.MultiHeadAttention(
            heads, WIDTH, heads * FEATURES, WIDTH, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, neurons, rngs=rngs)
        self.down = nnx.Linear(neurons, WIDTH, rngs=rngs)
        self.before_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """States (batch, patches, width) to states."""
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class VisionTransformer(nnx.Module):
    """Patches of 2 x 2 pixels, their places, layers, and the mean over patches."""

    def __init__(self, gone: float, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, WIDTH)))
        self.layers = nnx.List([Layer(gone, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (batch, 8, 8) to logits (batch, 10)."""
        # (batch, rows, 2, columns, 2) to (batch, patches, pixels of a patch).
        x = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        x = self.embed(x) + self.place[None]  # (batch, patches, width)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))  # (batch, 10)


def main(config: Config) -> None:
    """Trains, shrinks, times and reports."""
    with tempfile.TemporaryDirectory() as folder:
        # Seeds and criteria give the same programs: each is compiled once.
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        everything(config)


def everything(config: Config) -> None:
    """What `main` does, with a directory for compiled programs."""
    data, results = read(), {}
    for network in config.networks:
        cells = [
            compared(config, network, seed, data)
            for seed in measure.progress(config.seeds, f"training {network}", "seed")
        ]
        results[network] = {
            label: {
                key: [float(cell[label][key]) for cell in cells]
                for key in cells[0][label]
            }
            for label in cells[0]
        }
    times = {network: timed(config, network, data) for network in config.networks}
    print(f"{accuracies(results)}\n\n{speeds(results, times)}\n")
    measure.report(
        "digits_structure",
        config=dataclasses.asdict(config),
        results=results,
        milliseconds={
            network: {k: measure.median_and_spread(v) for k, v in milliseconds.items()}
            for network, milliseconds in times.items()
        },
    )


def read() -> Data:
    """The digits; every sixth one is held out."""
    parts = picture_questions.parts(picture_questions.read_source())
    train, held_out = parts["train"], parts["validation"]
    return Data(
        train.digits.astype(np.float32),
        train.labels,
        held_out.digits.astype(np.float32),
        held_out.labels,
    )


def kept_units(units: int, gone: float) -> int:
    """How many units are left, as `jp.shrink` counts."""
    # Rounded as `jp.shrink` rounds, so that built and shrunk have one shape.
    return units - round(gone * units)


def built(config: Config, network: str, gone: float, seed: int) -> Run:
    """A network that has only a share of its units from the start."""
    if network == "cnn":
        module = Convolutional(gone)
        fn: Any = module.apply
        params: Any = module.init(jax.random.key(seed), jnp.zeros((1, 8, 8)))
    else:
        model = VisionTransformer(gone, nnx.Rngs(seed))
        graphdef, params, buffers = nnx.split(model, nnx.Param, ...)

        def fn(params: Any, images: Any) -> jax.Array:
            return nnx.merge(graphdef, params, buffers)(images)

    return Run(fn, params, optimizer(config).init(params))


def compared(
    config: Config, network: str, seed: int, data: Data
) -> dict[str, dict[str, float]]:
    """One seed: of each candidate accuracy before and after retraining, and size."""
    dense = trained(config, built(config, network, 0.0, seed), seed, data, 0)
    accuracies = {"0 dense": measured(config, dense, seed, data)}
    for gone in config.shares:
        for method in METHODS:
            run = shrunk(config, dense, method, gone, data)
            accuracies[f"{gone:g} {method}"] = measured(config, run, seed, data)
        run = trained(config, built(config, network, gone, seed), seed, data, 0)
        accuracies[f"{gone:g} built"] = measured(config, run, seed, data)
    return accuracies


def shrunk(config: Config, dense: Run, method: str, gone: float, data: Data) -> Run:
    """The network without a share of the units of each of its groups."""
    fn, params, state = dense
    if method == "shrink_trained":
        images = data.images[: config.calibrated]
        batches = np.array_split(images, max(1, len(images) // 128))
        result = jp.shrink(
            fn,
            params,
            batches[0],
            sparsity=gone,
            batches=batches,
            relative=config.relative,
            progress=False,
        )
    else:
        scores = jp.scores.magnitude(params)
        if method == "preconditioned_magnitude":
            scores = jp.scores.preconditioned_magnitude(params, state)
        result = jp.shrink(fn, params, data.images[:1], scores, gone)
    # The optimizer's moments are cut alike, so that training goes on without a jolt.
    return Run(result.fn, result.params, result.cut(state))


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW whose rate falls in training and once more in retraining."""
    rate = config.learning_rate
    parts = [
        optax.cosine_decay_schedule(rate, steps, alpha=0.1)
        for steps in (config.steps, config.retraining)
    ]
    # One transformation for both, whose count says which cosine it is on.
    return optax.adamw(optax.join_schedules(parts, [config.steps]))


def trained(config: Config, run: Run, seed: int, data: Data, start: int) -> Run:
    """After all steps of training, or of retraining that starts behind them."""
    tx, (fn, params, state) = optimizer(config), run

    @jax.jit
    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                fn(params, images), labels
            )
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(start, start + (config.retraining if start else config.steps)):
        # By seed and step: all candidates of a seed see the same images in the same
        # order.
        rng = np.random.default_rng([seed, number])
        batch = rng.integers(0, len(data.images), config.batch_size)
        params, state = step(params, state, data.images[batch], data.labels[batch])
    return Run(fn, params, state)


def measured(config: Config, run: Run, seed: int, data: Data) -> dict[str, float]:
    """Accuracy on the held-out digits, before and after retraining; parameters."""
    forward = jax.jit(run.fn)

    def accuracy(params: Any) -> float:
        guessed = np.argmax(forward(params, data.held_out_images), -1)
        return float(np.mean(guessed == data.held_out_labels))

    return {
        "before": accuracy(run.params),
        "after": accuracy(trained(config, run, seed, data, config.steps).params),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
    }


def timed(config: Config, network: str, data: Data) -> dict[str, list[float]]:
    """Milliseconds of a forward: dense, shrunk and built, in turn."""
    images = jnp.resize(data.images, (config.timed, 8, 8))
    dense = built(config, network, 0.0, 0)
    runs = {"0 dense": dense}
    for gone in config.shares:
        runs[f"{gone:g} shrunk"] = shrunk(config, dense, "magnitude", gone, data)
        runs[f"{gone:g} built"] = built(config, network, gone, 0)
    times = measure.interleaved(
        {name: _forward(run, images) for name, run in runs.items()}, config.repeats
    )
    return {
        name: [1e3 * second for second in seconds] for name, seconds in times.items()
    }


def _forward(run: Run, images: jax.Array) -> Callable[[], jax.Array]:
    compiled = jax.jit(run.fn)
    return lambda: compiled(run.params, images)


def accuracies(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """A row for each network, share and candidate: percent, mean ± spread."""
    rows = [["network", "removed", "candidate", "before", "retrained", "parameters"]]
    for network, cells in results.items():
        for label, cell in cells.items():
            gone, method = label.split()  # "0.5 magnitude"
            percents = [
                measure.mean_and_spread([100 * share for share in cell[stage]], ".1f")
                for stage in ("before", "after")
            ]
            size = f"{cell['parameters'][0]:,.0f}"
            rows.append([network, f"{float(gone):.0%}", method, *percents, size])
    return measure.markdown(rows)


def speeds(
    results: dict[str, dict[str, dict[str, list[float]]]],
    times: dict[str, dict[str, list[float]]],
) -> str:
    """A row for each network and share: parameters and milliseconds, medians."""
    rows = [["network", "removed", "parameters", "dense", "shrunk", "built"]]
    for network, milliseconds in times.items():
        medians = {
            name: statistics.median(values) for name, values in milliseconds.items()
        }
        for name in milliseconds:
            gone, candidate = name.split()
            if candidate != "shrunk":
                continue
            size = results[network][f"{gone} built"]["parameters"][0]
            columns = [medians["0 dense"], medians[name], medians[f"{gone} built"]]
            texts = [f"{value:.2f} ms" for value in columns]
            rows.append([network, f"{float(gone):.0%}", f"{size:,.0f}", *texts])
    return measure.markdown(rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
