"""Matrices that read a narrower residual stream, fitted to what is left of it.

Layer after layer, with x what a norm of the whole model gives and y what it gives in
the narrower one, whose layers before are fitted already, the rows W of each matrix
that reads it become A W, where A (k, d) has the least

  E |y A - x|^2 + ridge sum_j E[y_j^2] |A_j - S_j|^2,

S taking the channels that stay, with ridge = 0.1, which holds it near S where the
calibration says little. So each matrix is given the inputs of before as well as
the channels that stay can tell them. A head of its own is fitted likewise. Where the
head is the embedding, the gains of the last norm are fitted instead: to the logits of
the whole model, less their mean over the vocabulary, which changes no prediction.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.models.decoder.layers import apply_norm
from jaxprune.lm.models.hf.smaller import EMBEDDING
from jaxprune.lm.models.loaded_model import LoadedModel

NORMS = ("norm_attention", "norm_mlp")
"""The norms of a layer that read the residual stream."""

_RIDGE = 0.1
_WRITERS = ("out", "down")  # matrices that read something else


class ReportingNorm(nnx.Module):
    """A norm that reports what it gives."""

    def __init__(self, norm: Any, report: Callable[[Array], None]) -> None:
        """Wraps a norm; `report` is called with its output."""
        self.norm, self.report = norm, report

    def __call__(self, x: Array) -> Array:
        """As the norm."""
        y = self.norm(x)
        self.report(y)
        return y


class _Moments(NamedTuple):
    """Second moments of what a norm gives in both models, sums over tokens, float64.

    Attributes:
      narrow: of the narrower model with itself, (k, k).
      cross: of the narrower with the whole one, (k, d).
    """

    narrow: Float[np.ndarray, "k k"]
    cross: Float[np.ndarray, "k d"]


class _Stream:
    """The residual stream of a model before a layer, for all tokens, batch by batch."""

    def __init__(self, model: LoadedModel, batches: list[Array]) -> None:
        self._decoder = decoder = model.decoder()
        self._layers = [nnx.split(layer, nnx.Param) for layer in decoder.layers]
        self._arguments = _layer_arguments(model.decoder(), batches[0][:1])
        self.states = [decoder.embed(ids) for ids in batches]  # (batch, length, width)

    def normalised_first(self, layer: int) -> list[Array]:
        """What the norm before the attention of a layer gives, batch by batch."""
        norm = self._decoder.layers[layer].norm_attention
        return [apply_norm(norm, x) for x in self.states]

    def run(
        self, layer: int, params: Any = None
    ) -> tuple[list[Array], dict[str, list[Array]]]:
        """The states behind a layer, and what its norms give, batch by batch."""
        graphdef, before = self._layers[layer]
        params = before if params is None else params
        runs = [
            _run_layer(graphdef, params, x, self._arguments[layer]) for x in self.states
        ]
        states, outputs = zip(*runs, strict=True)
        of_norms = map(list, zip(*outputs, strict=True))
        names = norms_of(self._decoder.layers[layer])
        return list(states), dict(zip(names, of_norms, strict=True))

    def normalised(self) -> Iterator[Array]:
        """What the last norm gives, behind the last layer."""
        return map(self._decoder.norm, self.states)


def fit_readers(
    model: LoadedModel,
    small: LoadedModel,
    kept: Int[np.ndarray, "k"],
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int = 4,
) -> LoadedModel:
    """The narrower model whose matrices make up for the channels that went.

    Args:
      model: model with its parameters in memory; its head may be one of its own where
        that of `small` is the embedding.
      small: the same without the other channels, of `hf.keep_channels`.
      kept: numbers of the channels that stayed, ascending.
      tokens: tokens of the calibration.
      batch: number of sequences that the models see at once.

    Returns:
      The narrower model.
    """
    # (batch, length) each
    batches = [jnp.asarray(tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
    whole, narrow = _Stream(model, batches), _Stream(small, batches)
    before, named = (dict(tree.named_leaves(m.params)) for m in (model, small))

    def fit(names: Iterable[str], moments: _Moments) -> None:
        matrix = jnp.asarray(_least_squares(moments, kept), jnp.float32)  # (k, d)
        for name in names:
            kernel = before[name]  # [experts,] d, out
            fitted = jnp.matmul(matrix, kernel.astype(jnp.float32), precision="highest")
            named[name] = fitted.astype(kernel.dtype)

    count = model.config.layers
    with Progress(count, "fitting layers", unit="layer", leave=False) as progress:
        for i in range(count):
            whole.states, norm_outputs = whole.run(i)
            # What the MLP is given depends on the attention, which is fitted first.
            attention, mlp = NORMS
            if attention in norm_outputs:
                pairs = zip(
                    narrow.normalised_first(i), norm_outputs[attention], strict=True
                )
                fit(readers(named, i, attention), _moments(pairs))
            if mlp in norm_outputs:
                _, outputs = narrow.run(i, _layer_params(small.params, named, i))
                pairs = zip(outputs[mlp], norm_outputs[mlp], strict=True)
                fit(readers(named, i, mlp), _moments(pairs))
            narrow.states, _ = narrow.run(i, _layer_params(small.params, named, i))
            progress.update(1)
    moments = _moments(zip(narrow.normalised(), whole.normalised(), strict=True))
    if small.config.tie_weights:
        tied = model.config.tie_weights
        head = before[EMBEDDING] if tied else before["head/kernel"].T
        tables = (named[EMBEDDING], head)  # (vocab, k), (vocab, d)
        named["norm/scale"] = _with_gains(
            named["norm/scale"],
            _fitted_gains(moments, tables),
            plus_one=model.config.norm == "rms_plus_one",
        )
    else:
        fit(["head/kernel"], moments)
    structure = jax.tree.structure(small.params)
    return small._replace(params=jax.tree.unflatten(structure, [*named.values()]))


def norms_of(layer: Any) -> list[str]:
    """Those of `NORMS` that a layer has: without an MLP, say, it has one."""
    return [name for name in NORMS if getattr(layer, name) is not None]


def readers(names: Collection[str], layer: int, norm: str) -> list[str]:
    """The kernels of a layer that read what a norm of it gives."""
    module = norm.removeprefix("norm_")
    return [
        name
        for name in names
        if name.startswith(f"layers/{layer}/{module}/")
        and name.endswith("/kernel")
        and name.split("/")[-2] not in _WRITERS
    ]


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: Any, params: Any, x: Array, arguments: Any
) -> tuple[Array, list[Array]]:
    """The stream behind a layer, and what its norms gave."""
    layer = nnx.merge(graphdef, params)
    outputs: list[Array] = []
    for name in norms_of(layer):
        setattr(layer, name, ReportingNorm(getattr(layer, name), outputs.append))
    return layer(x, *arguments)[0], outputs


class _Recording(nnx.Module):
    """In the place of a layer: notes its arguments and passes the stream on."""

    def __init__(self, notes: list[Any]) -> None:
        self.note = notes.append

    def __call__(self, x: Array, *arguments: Any) -> tuple[Array, None]:
        self.note(arguments)
        return x, None


def _layer_arguments(decoder: Any, ids: Array) -> list[Any]:
    """What each layer is called with beside the stream: angles, mask, no cache."""
    notes: list[Any] = []
    layers = range(len(decoder.layers))
    decoder.layers = nnx.List([_Recording(notes) for _ in layers])
    decoder.states(decoder.embed(ids))
    return notes


def _layer_params(params: Any, named: dict[str, Array], layer: int) -> Any:
    """The parameters of a layer, with the leaves that are fitted."""
    state = params["layers"][layer]
    leaves = [named[f"layers/{layer}/{name}"] for name in tree.names(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _moments(outputs: Iterable[tuple[Array, Array]]) -> _Moments:
    """The moments of pairs (batch, length, k) and (batch, length, d)."""
    sums: list[Any] = [0.0, 0.0]
    for pair in outputs:
        products = jax.device_get(_products(*pair))
        sums = [
            total + product.astype(np.float64)
            for total, product in zip(sums, products, strict=True)
        ]
    return _Moments(*sums)


@jax.jit
def _products(narrow: Array, whole: Array) -> tuple[Array, Array]:
    y, x = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (narrow, whole))
    square, cross = (jnp.matmul(y.T, z, precision="highest") for z in (y, x))
    return square, cross


def _least_squares(
    moments: _Moments, kept: Int[np.ndarray, "k"]
) -> Float[np.ndarray, "k d"]:
    """A, as above."""
    narrow, cross = moments
    chosen = np.eye(cross.shape[1])[kept]  # (k, d), S
    # Of what S leaves, which is all that the ridge holds down.
    return chosen + _solve_with_ridge(narrow, cross - narrow @ chosen)


def _solve_with_ridge(
    matrix: Float[np.ndarray, "k k"], target: Float[np.ndarray, "k ..."]
) -> Float[np.ndarray, "k ..."]:
    """X of the least error of matrix X = target, with a ridge."""
    squares = np.diag(matrix)
    # By channel: those of a few are far above the others. A channel may hold nothing.
    least = 1e-6 * np.mean(squares) + np.finfo(np.float64).tiny
    ridge = _RIDGE * np.diag(np.maximum(squares, least))
    return np.linalg.solve(matrix + ridge, target)


def _fitted_gains(
    moments: _Moments, tables: tuple[Array, Array]
) -> Float[np.ndarray, "k"]:
    """Factors on the gains of the last norm, by the logits of a tied head.

    With F and E the embeddings (vocab, k) and (vocab, d), each less its mean row, the
    factors g have the least E|(g y) F^T - x E^T|^2: (F^T F * E[y y^T]) g are the sums
    of the rows of F^T E * E[y x^T], products element by element.
    """
    # A constant that all tokens' logits share changes no prediction.
    narrow, whole = (
        table - jnp.mean(table, axis=0, keepdims=True)
        for table in (table.astype(jnp.float32) for table in tables)
    )
    normal, target = (
        np.asarray(jnp.matmul(narrow.T, table, precision="highest"), np.float64) * m
        for table, m in zip((narrow, whole), moments, strict=True)
    )  # (k, k), (k, d)
    residual = target.sum(axis=1) - normal.sum(axis=1)  # (k,)
    return 1 + _solve_with_ridge(normal, residual)


def _with_gains(
    leaf: Array, factors: Float[np.ndarray, "k"], *, plus_one: bool
) -> Array:
    """A norm's gains times factors, where Gemma's are stored less 1."""
    gains = leaf.astype(jnp.float32) + plus_one
    return (gains * jnp.asarray(factors, jnp.float32) - plus_one).astype(leaf.dtype)
