"""Sums of inputs over batches, on one device or spread over several.

Sums run over the positions that count, all of them unless the caller says otherwise; a
sequence's first token (BOS) counts too. With a mesh, each device computes the terms of
its own batch, and the sums are split over all devices. Each device adds up its own part
of the terms of all batches, in the order of the batches, so that the sums have the same
bits as on one device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.arrays import grouped_rows, placement
from jaxprune.arrays.per_device import PerDevice, put
from jaxprune.graph.operands import Input
from jaxprune.graph.segments import Segment
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics, as_weights

# A Hessian is halved down to blocks of so many inputs; those under the diagonal are
# never computed.
_BLOCK = 512


class Sums:
    """The sums of inputs over batches; weights of one input share theirs."""

    def __init__(
        self,
        *,
        hessian: bool,
        relative: bool = False,
        drift: bool = False,
        devices: PerDevice | None = None,
    ) -> None:
        """Begins with nothing.

        Args:
          hessian: whether X^T X is summed up as well.
          relative: whether each sample is divided by its root mean square first.
          drift: whether X^T (D - X) is, too; then `add` is given what D is read from.
          devices: devices that hold an input each, where a value has one for each.
        """
        self._extra = _Extra(hessian, drift)
        self._relative, self._devices = relative, devices
        # Names of weights to the input that they share and its sums.
        self._sums: dict[tuple[str, ...], tuple[Input, Any]] = {}

    @property
    def drift(self) -> bool:
        """Whether the dense model's inputs are compared with the pruned model's."""
        return self._extra.drift

    def add(
        self,
        segment: Segment,
        groups: Sequence[tuple[str, ...]],
        value: Any,
        positions: jax.Array | None,
        dense: Any = None,
    ) -> None:
        """Adds the input of a segment, of one batch or of one batch a device.

        Args:
          segment: the segment.
          groups: names of weights, those with the same statistics together.
          value: what the input is read from.
          positions: which samples count, booleans of their shape, or None for all.
          dense: what the dense model's input is read from, where drift is summed up.
        """
        source = segment.source
        add = _adding(self._devices, source, self._extra, self._relative)
        for names in groups:
            if names in self._sums:
                _, sums = self._sums[names]
            else:
                sums = _zeros(self._devices, source, value, self._extra)
            self._sums[names] = source, add(sums, value, positions, dense)

    def finish(self, names: tuple[str, ...]) -> dict[str, InputStatistics]:
        """The statistics of a group of weights by name; its sums are freed.

        Raises:
          ValueError: the input is not finite, or no position counts.
        """
        source, sums = self._sums.pop(names)
        statistics = _finishing(self._devices, source, self._extra)(sums)
        finite = bool(np.isfinite(statistics.mean_square).all())
        counts = float(statistics.samples) > 0
        if not (finite and counts):
            raise ValueError(
                f"the input of '{names[0]}' must be finite and some position must "
                "count, but it is not or none does; look for NaN or overflow in the "
                "model's forward pass on these batches (float32 in place of float16 "
                "may help)"
            )
        return dict.fromkeys(names, statistics)

    def finish_all(self) -> dict[str, InputStatistics]:
        """The statistics of all groups, as `finish` gives them."""
        total: dict[str, InputStatistics] = {}
        for names in list(self._sums):
            for name, statistics in self.finish(names).items():
                # Batches of another shape may group the same weights otherwise.
                total[name] = (
                    _merged(total[name], statistics) if name in total else statistics
                )
        return total


def _merged(first: InputStatistics, second: InputStatistics) -> InputStatistics:
    """The statistics of the samples of both; no drift."""
    samples = first.samples + second.samples

    def mean(x: Any, y: Any) -> Any:
        return None if x is None else (x * first.samples + y * second.samples) / samples

    return InputStatistics(
        samples=samples,
        mean_square=mean(first.mean_square, second.mean_square),
        hessian=mean(first.hessian, second.hessian),
        reached=first.reached + second.reached,
    )


class _Extra(NamedTuple):
    """Which sums there are besides those that always are."""

    hessian: bool
    drift: bool


def _shapes(source: Input, extra: _Extra) -> InputStatistics:
    """The shapes of an input's sums."""
    batch, _, inputs = source.shape

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.float32)

    wide = floats(batch, inputs, inputs)
    drift = wide if extra.drift and batch == 1 and not source.grouped else None
    hessian = wide if extra.hessian else None
    return InputStatistics(
        floats(), floats(batch, inputs), hessian, floats(batch), drift
    )


def _part(shape: jax.ShapeDtypeStruct, devices: int) -> int:
    """How many elements of an array each device has, the last one fewer."""
    return -(-math.prod(shape.shape) // devices)


def _zeros(devices: PerDevice | None, source: Input, value: Any, extra: _Extra) -> Any:
    """Sums of no batch; over devices a list of their parts, (devices, part)."""
    shapes = _shapes(source, extra)
    if devices is not None:
        parts = [_part(shape, devices.count) for shape in jax.tree.leaves(shapes)]
        zeros = [np.zeros((devices.count, n), np.float32) for n in parts]
        return [put(x, devices.split) for x in zeros]
    # On the one device that the value is on; sums that are put nowhere would be added
    # to by one program at first and by another one after.
    sharding = getattr(jax.tree.leaves(value)[0], "sharding", None)
    sharding = sharding if sharding and len(sharding.device_set) == 1 else None
    return jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, shape.dtype, device=sharding), shapes
    )


@functools.lru_cache(64)
def _adding(
    devices: PerDevice | None, source: Input, extra: _Extra, relative: bool
) -> Callable[..., Any]:
    """A function that adds one more input, or one more of each device, to sums.

    Without a mesh the value may lie on one device, or be sharded by the caller: the
    compiler decides where terms are summed. With one, each device sums its part of all
    terms in the order of the batches.
    """
    added = functools.partial(_added, source=source, relative=relative)

    def add(sums: Any, value: Any, positions: jax.Array | None, dense: Any) -> Any:
        counted = None if positions is None else as_weights(positions)
        return placement.automatic(added, sums, value, counted, dense)

    if devices is None:
        return add

    def add_parts(
        parts: list[jax.Array], value: Any, positions: jax.Array | None, dense: Any
    ) -> list[jax.Array]:
        counted = None if positions is None else as_weights(positions)
        zeros = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype), _shapes(source, extra)
        )
        terms = added(zeros, value, counted, dense)
        pairs = zip(parts, jax.tree.leaves(terms), strict=True)
        return [in_order(part, array) for part, array in pairs]

    def in_order(part: jax.Array, terms: jax.Array) -> jax.Array:
        # (devices, part): what each device adds up, of this device's terms.
        flat = jnp.ravel(terms)
        flat = jnp.pad(flat, (0, part.size * devices.count - flat.size))
        rows = devices.exchanged(flat.reshape(devices.count, part.size))
        return jax.lax.fori_loop(0, devices.count, lambda i, x: x + rows[i], part)

    return devices.compiled(add_parts, (True, True, True, True))


@functools.lru_cache(64)
def _finishing(
    devices: PerDevice | None, source: Input, extra: _Extra
) -> Callable[..., InputStatistics]:
    """A function that gives the statistics of sums, or of their parts on devices.

    Of parts they are whole on every device; Hessians of several matrices are split by
    matrix where the devices divide their number.
    """
    if devices is None:
        return functools.partial(placement.automatic, _divided)
    shapes, structure = jax.tree.flatten(_shapes(source, extra))
    by_matrix = source.shape[0] % devices.count == 0

    def finish(parts: list[jax.Array]) -> InputStatistics:
        pairs = zip(parts, shapes, strict=True)
        sums = [x.ravel()[: math.prod(k.shape)].reshape(k.shape) for x, k in pairs]
        return _divided(jax.tree.unflatten(structure, sums))

    wide = devices.split if by_matrix else devices.whole
    placed = [wide if len(k.shape) == 3 else devices.whole for k in shapes]
    return jax.jit(finish, out_shardings=jax.tree.unflatten(structure, placed))


@functools.partial(jax.jit, static_argnames=("source", "relative"), donate_argnums=0)
def _added(
    sums: InputStatistics,
    value: Any,
    counted: Float[Array, " samples"] | None,
    dense: Any = None,
    *,
    source: Input,
    relative: bool,
) -> InputStatistics:
    """Sums with one more batch in them, not yet divided by the number of samples."""
    x = source.read(value).astype(np.float32)  # (batch, samples, in)
    drift = sums.drift
    # (batch, samples, in): D - X, or anything where no drift is summed up.
    change = x if drift is None else source.read(dense).astype(np.float32) - x
    sizes = value[1] if source.grouped else None
    samples = jnp.asarray(x.shape[1], np.float32)
    if counted is not None:
        # Selected, not multiplied: what does not count may be NaN.
        counts = counted[None, :, None] > 0
        x, change = (jnp.where(counts, y, np.float32(0)) for y in (x, change))
        samples = counted.sum()
    if relative:
        x, change = _of_one_size(x, change)
    if drift is not None:
        drift = drift + _gram(x, change)
    square, hessian = sums.mean_square, sums.hessian
    if hessian is None:
        square = square + _over_samples(jnp.square(x), sizes)
    elif sizes is not None:
        hessian = grouped_rows.add_outer(hessian, x[0], x[0], sizes)
    else:  # its diagonal is the squares
        hessian = _add_upper(hessian, x, 0, x.shape[2])
    # (batch, samples, 1): 1 where some feature of a sample is not zero.
    nonzero = jnp.any(x != 0, axis=-1, keepdims=True).astype(np.float32)
    reached = sums.reached + _over_samples(nonzero, sizes)[:, 0]  # (batch,)
    return InputStatistics(sums.samples + samples, square, hessian, reached, drift)


def _over_samples(
    terms: Float[Array, "_ samples n"], sizes: Int[Array, " batch"] | None
) -> Float[Array, "batch n"]:
    """The sum over samples, for each group over its own."""
    return terms.sum(1) if sizes is None else grouped_rows.sums(terms[0], sizes)


def _of_one_size(
    x: Float[Array, "batch samples in"], change: Float[Array, "batch samples in"]
) -> tuple[jax.Array, jax.Array]:
    """Each sample of both divided by x's root mean square; of zeros only, as it is."""
    # By the largest first: squares may overflow, or underflow to nothing.
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    x, change = x / largest, change / largest
    size = jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
    size = jnp.where(size > 0, size, 1)
    return x / size, change / size


def _add_upper(
    hessian: Float[Array, "batch in in"],
    x: Float[Array, "batch samples in"],
    start: int,
    stop: int,
) -> Float[Array, "batch in in"]:
    """Adds X^T X of some inputs to the Hessian, on and above its diagonal."""
    if stop - start <= _BLOCK:
        part = x[:, :, start:stop]  # (batch, samples, inputs of the part)
        return hessian.at[:, start:stop, start:stop].add(_gram(part, part))
    half = (start + stop) // 2
    corner = _gram(x[:, :, start:half], x[:, :, half:stop])
    hessian = hessian.at[:, start:half, half:stop].add(corner)
    return _add_upper(_add_upper(hessian, x, start, half), x, half, stop)


def _gram(
    x: Float[Array, "batch samples i"], y: Float[Array, "batch samples j"]
) -> Float[Array, "batch i j"]:
    return jnp.einsum("bsi,bsj->bij", x, y, precision="highest")


@jax.jit
def _divided(sums: InputStatistics) -> InputStatistics:
    """Means from sums, and the Hessian's lower half from its upper."""
    scale = 1 / sums.samples
    square, hessian = sums.mean_square, sums.hessian
    drift = None if sums.drift is None else sums.drift * scale
    if hessian is None:
        square = square * scale
    else:
        upper = jnp.triu(hessian) * scale  # (batch, in, in)
        hessian = upper + jnp.swapaxes(jnp.triu(hessian, 1) * scale, 1, 2)
        square = jnp.diagonal(upper, axis1=1, axis2=2)  # (batch, in)
    # `finish` checks only the mean square: it becomes NaN if the dense input is not
    # finite.
    if drift is not None:
        square = jnp.where(jnp.isfinite(drift).all(), square, jnp.nan)
    return InputStatistics(sums.samples, square, hessian, sums.reached, drift)
