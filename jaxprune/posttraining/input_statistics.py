"""What weights see: mean squares and Hessians of inputs, summed up over batches.

For each input feature the mean square, and on request the Hessian of the layer's
squared error, X^T X / n, in float32. Where the dense model runs beside the pruned one,
its input D is compared with X too: the drift, X^T (D - X) / n. Linear ops that share an
input share its statistics. Sums run over the positions that count, all of them unless
the caller says otherwise; a sequence's first token (BOS) counts too.

With a mesh, each device computes the terms of its own batch, and the sums are split
over all devices. Each device adds up its own part of the terms of all batches, in the
order of the batches, so that the sums have the same bits as on one device.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.arrays import grouped_rows, placement
from jaxprune.arrays.per_device import PerDevice, put
from jaxprune.graph.operands import Input
from jaxprune.graph.segments import Segment

# A Hessian is halved down to blocks of so many inputs; those under the diagonal are
# never computed.
_BLOCK = 512


class InputStatistics(NamedTuple):
    """The second moments of one input.

    Attributes:
      samples: over how many positions, float32 scalar.
      mean_square: (batch, in) float32: the mean of each feature's square.
      hessian: (batch, in, in) float32: X^T X / samples; None where not asked for.
      reached: (batch,) float32: at how many positions the input is not all zero, the
        tokens that an expert was given.
      drift: (1, in, in) float32: X^T (D - X) / samples, D the dense model's input. None
        where D was not given, and for a weight of several matrices, such as experts,
        since the dense model may send other samples to each of them.
    """

    samples: Float[Array, ""]
    mean_square: Float[Array, "batch in"]
    hessian: Float[Array, "batch in in"] | None
    reached: Float[Array, " batch"]
    drift: Float[Array, "1 in in"] | None = None


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
          devices: those that hold an input each, where a value has one for each.
        """
        self._extra = _Extra(hessian, drift)
        self._relative, self._devices = relative, devices
        self._sources: dict[tuple[str, ...], Input] = {}
        self._sums: dict[tuple[str, ...], Any] = {}

    def add(
        self,
        segment: Segment,
        groups: Sequence[tuple[str, ...]],
        value: Any,
        positions: jax.Array | None,
        dense: Any = None,
    ) -> None:
        """Adds the input of a segment, of one batch.

        Args:
          segment: the segment.
          groups: names of weights, those with the same statistics together.
          value: what the input is read from.
          positions: which samples count, booleans of their shape, or None for all.
          dense: what the dense model's input is read from, where drift is wanted.
        """
        own = value, positions, dense
        if self._devices is not None:
            self._add_of_each(self._devices, segment.source, groups, *own)
            return
        counted = counted_samples(segment, positions)
        for names in groups:
            before = self._sums.get(names)
            if before is None:
                before = _zeros(segment.source, value, self._extra)
            self._sums[names] = placement.automatic(
                functools.partial(
                    _added, source=segment.source, relative=self._relative
                ),
                before,
                value,
                counted,
                dense,
            )

    def _add_of_each(
        self,
        devices: PerDevice,
        source: Input,
        groups: Sequence[tuple[str, ...]],
        value: Any,
        positions: jax.Array | None,
        dense: Any,
    ) -> None:
        """Adds the inputs that the devices have, (devices, ...)."""
        add = _adding(devices, source, self._extra, self._relative)
        for names in groups:
            before = self._sums.get(names)
            if before is None:
                kinds = jax.tree.leaves(_kinds(source, self._extra))
                parts = [_part(kind, devices.count) for kind in kinds]
                zeros = [np.zeros((devices.count, n), np.float32) for n in parts]
                before = [put(x, devices.split) for x in zeros]
            self._sums[names] = add(before, value, positions, dense)
            self._sources[names] = source

    def finish(self, names: tuple[str, ...]) -> dict[str, InputStatistics]:
        """The statistics of a group of weights by name; its sums are freed.

        Raises:
          ValueError: the input is not finite, or no position counts.
        """
        sums = self._sums.pop(names)
        if self._devices is None:
            statistics = placement.automatic(_divided, sums)
        else:
            source = self._sources.pop(names)
            statistics = _finishing(self._devices, source, self._extra)(sums)
        finite = np.isfinite(statistics.mean_square).all()
        if not (finite and float(statistics.samples) > 0):
            raise ValueError(
                f"the input of '{names[0]}' must be finite and some position must "
                "count, but it is not or none does; look for NaN or overflow in the "
                "model's forward pass on these batches (float32 in place of float16 "
                "may help)"
            )
        return dict.fromkeys(names, statistics)

    def finish_all(self) -> dict[str, InputStatistics]:
        """The statistics of all groups, as `finish` gives them."""
        found: dict[str, InputStatistics] = {}
        for names in list(self._sums):
            for name, own in self.finish(names).items():
                # Batches of another kind may group the same weights otherwise.
                found[name] = _together(found[name], own) if name in found else own
        return found


def _together(one: InputStatistics, other: InputStatistics) -> InputStatistics:
    """The statistics of the samples of both; no drift."""
    samples = one.samples + other.samples

    def mean(x: Any, y: Any) -> Any:
        return None if x is None else (x * one.samples + y * other.samples) / samples

    return InputStatistics(
        samples=samples,
        mean_square=mean(one.mean_square, other.mean_square),
        hessian=mean(one.hessian, other.hessian),
        reached=one.reached + other.reached,
    )


def counted_samples(
    segment: Segment, positions: jax.Array | None
) -> Float[Array, " samples"] | None:
    """Which samples of a segment's input count.

    Args:
      segment: the segment.
      positions: booleans of the samples' shape, or None for all.

    Returns:
      1 for samples that count, 0 for others; None for all.

    Raises:
      ValueError: the shapes differ.
      TypeError: they are no booleans.
    """
    if positions is None:
        return None
    kind = getattr(positions, "dtype", type(positions).__name__)
    if str(kind) != "bool":
        raise TypeError(
            f"positions must be an array of booleans, got {kind}; compare what they "
            "are made of, as in mask > 0"
        )
    if segment.source.grouped:
        raise ValueError(
            f"positions say which tokens count, but rows come to "
            f"'{segment.linear_ops[0].name}' group by group; leave such weights out "
            "with prunable=..., or positions"
        )
    leading, shape = segment.source.leading, positions.shape
    if math.prod(leading) != positions.size or leading[: len(shape)] != shape:
        raise ValueError(
            f"positions must have the shape of the samples of each input, but that of "
            f"'{segment.linear_ops[0].name}' has samples {leading} and positions are "
            f"{shape}; leave such weights out with prunable=..., or positions"
        )
    return jnp.ravel(positions).astype(np.float32)


class _Extra(NamedTuple):
    """Which sums there are besides those that always are."""

    hessian: bool
    drift: bool


def _kinds(source: Input, extra: _Extra) -> InputStatistics:
    """The shapes of an input's sums."""
    batch, _, inputs = source.shape

    def kind(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.float32)

    wide = kind(batch, inputs, inputs)
    drift = wide if extra.drift and batch == 1 and not source.grouped else None
    hessian = wide if extra.hessian else None
    return InputStatistics(kind(), kind(batch, inputs), hessian, kind(batch), drift)


def _part(kind: jax.ShapeDtypeStruct, devices: int) -> int:
    """How many elements of an array each device has, the last one fewer."""
    return -(-math.prod(kind.shape) // devices)


@functools.lru_cache(64)
def _adding(devices: PerDevice, source: Input, extra: _Extra, relative: bool) -> Any:
    """A program that adds one more input of each device to sums (devices, part)."""

    def add(
        parts: list[jax.Array], value: Any, positions: jax.Array | None, dense: Any
    ) -> list[jax.Array]:
        counted = None if positions is None else positions.ravel().astype(np.float32)
        zeros = jax.tree.map(
            lambda kind: jnp.zeros(kind.shape, kind.dtype), _kinds(source, extra)
        )
        own = _added(zeros, value, counted, dense, source=source, relative=relative)
        pairs = zip(parts, jax.tree.leaves(own), strict=True)
        return [in_order(part, terms) for part, terms in pairs]

    def in_order(part: jax.Array, terms: jax.Array) -> jax.Array:
        flat = jnp.ravel(terms)
        flat = jnp.pad(flat, (0, part.size * devices.count - flat.size))
        rows = devices.exchanged(flat.reshape(devices.count, part.size))
        return jax.lax.fori_loop(0, devices.count, lambda i, x: x + rows[i], part)

    return devices.compiled(add, (True, True, True, True))


@functools.lru_cache(64)
def _finishing(devices: PerDevice, source: Input, extra: _Extra) -> Any:
    """A program that gives the statistics of sums (devices, part).

    They are whole on every device; Hessians of several matrices are split by matrix
    where the devices divide their number.
    """
    kinds, structure = jax.tree.flatten(_kinds(source, extra))
    by_matrix = source.shape[0] % devices.count == 0

    def finish(parts: list[jax.Array]) -> InputStatistics:
        pairs = zip(parts, kinds, strict=True)
        found = [x.ravel()[: math.prod(k.shape)].reshape(k.shape) for x, k in pairs]
        return _divided(jax.tree.unflatten(structure, found))

    wide = devices.split if by_matrix else devices.whole
    placed = [wide if len(kind.shape) == 3 else devices.whole for kind in kinds]
    return jax.jit(finish, out_shardings=jax.tree.unflatten(structure, placed))


def _zeros(source: Input, value: Any, extra: _Extra) -> InputStatistics:
    """Sums of no batch."""
    # On the one device that the value is on; sums that are put nowhere would be added
    # to by one program at first and by another one after.
    where = getattr(jax.tree.leaves(value)[0], "sharding", None)
    where = where if where and len(where.device_set) == 1 else None
    return jax.tree.map(
        lambda kind: jnp.zeros(kind.shape, kind.dtype, device=where),
        _kinds(source, extra),
    )


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
    apart = x if drift is None else source.read(dense).astype(np.float32) - x
    sizes = value[1] if source.grouped else None
    samples = jnp.asarray(x.shape[1], np.float32)
    if counted is not None:
        # Selected, not multiplied: what does not count may be NaN.
        counts = counted[None, :, None] > 0
        x, apart = (jnp.where(counts, own, np.float32(0)) for own in (x, apart))
        samples = counted.sum()
    if relative:
        x, apart = _of_one_size(x, apart)
    if drift is not None:
        drift = drift + _gram(x, apart)
    square, hessian = sums.mean_square, sums.hessian
    if hessian is None:
        square = square + _over_samples(jnp.square(x), sizes)
    elif sizes is not None:
        hessian = grouped_rows.add_outer(hessian, x[0], x[0], sizes)
    else:  # its diagonal is the squares
        hessian = _add_upper(hessian, x, 0, x.shape[2])
    seen = jnp.any(x != 0, axis=-1, keepdims=True).astype(np.float32)
    reached = sums.reached + _over_samples(seen, sizes)[:, 0]  # (batch,)
    return InputStatistics(sums.samples + samples, square, hessian, reached, drift)


def _over_samples(
    terms: Float[Array, "_ samples n"], sizes: Int[Array, " batch"] | None
) -> Float[Array, "batch n"]:
    """The sum over samples, for each group over its own."""
    return terms.sum(1) if sizes is None else grouped_rows.sums(terms[0], sizes)


def _of_one_size(
    x: Float[Array, "batch samples in"], apart: Float[Array, "batch samples in"]
) -> tuple[jax.Array, jax.Array]:
    """Each sample of both divided by x's root mean square; of zeros only, as it is."""
    # By the largest first: squares may overflow, or underflow to nothing.
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    x, apart = x / largest, apart / largest
    size = jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
    size = jnp.where(size > 0, size, 1)
    return x / size, apart / size


def _add_upper(
    hessian: Float[Array, "batch in in"],
    x: Float[Array, "batch samples in"],
    start: int,
    stop: int,
) -> Float[Array, "batch in in"]:
    """Adds X^T X of some inputs to the Hessian, on and above its diagonal."""
    if stop - start <= _BLOCK:
        own = x[:, :, start:stop]
        return hessian.at[:, start:stop, start:stop].add(_gram(own, own))
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
