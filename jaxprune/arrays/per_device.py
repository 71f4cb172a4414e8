"""The devices of a mesh, each with a value of its own: a batch, or a matrix.

What one device does with its value is the program that a single device would run, of
the same shapes, so it gives the same bits. Values of all devices are one array with an
axis of devices in front; what all devices need is whole on each.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_AXIS = "device"


@dataclasses.dataclass(frozen=True)
class PerDevice:
    """The devices, in order; over several processes too, which then all do the same.

    Attributes:
      mesh: one axis, "device".
    """

    mesh: Mesh

    @classmethod
    def of(cls, mesh: Mesh) -> "PerDevice":
        """The devices of a mesh of any axes, in the order that it has them in."""
        devices = mesh.devices.reshape(-1)
        return cls(Mesh(devices, (_AXIS,), axis_types=(AxisType.Auto,)))

    @property
    def count(self) -> int:
        """How many devices there are."""
        return self.mesh.size

    @property
    def whole(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """Each device its part along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(_AXIS))

    def everywhere(self, tree: Any) -> Any:
        """Arrays, whole on every device."""
        return jax.tree.map(lambda leaf: put(leaf, self.whole), tree)

    def stacked(self, trees: Sequence[Any]) -> Any:
        """Trees of arrays of this process, one a device: (devices, ...)."""

        def stack(*leaves: Any) -> jax.Array:
            # NumPy has no random keys; their words are stacked and made keys again.
            if jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key):
                words = stack(*map(jax.random.key_data, leaves))
                impl = jax.random.key_impl(leaves[0])
                return jax.random.wrap_key_data(words, impl=impl)
            return put(np.stack(jax.device_get(leaves)), self.split)

        return jax.tree.map(stack, *trees)

    def in_turn(self, items: Sequence[Any]) -> list[Any]:
        """Stacks trees in groups of one for each device; None for a group of None."""
        groups = in_groups(items, self.count)
        return [None if group[0] is None else self.stacked(group) for group in groups]

    def first(self, tree: Any, count: int) -> Any:
        """What the first `count` devices have, (count, ...), whole on every device."""
        return _first(tree, count=count, sharding=self.whole)

    def local(self, tree: Any) -> Any:
        """Arrays that are whole on every device, on this process's first alone."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def compiled(
        self, function: Callable[..., Any], is_stacked: Sequence[bool]
    ) -> Callable[..., Any]:
        """A function of one device's values, compiled for all devices.

        Args:
          function: function of pytrees to a pytree; it may use collectives along
            "device".
          is_stacked: whether each argument is stacked, a value for each device; others
            are whole on every device.

        Returns:
          The function of stacked and whole arguments; its results are stacked.
        """

        def one(*arguments: Any) -> Any:
            pairs = zip(arguments, is_stacked, strict=True)
            alone = [jax.tree.map(_only, x) if stacked else x for x, stacked in pairs]
            return jax.tree.map(lambda x: x[None], function(*alone))

        specs = tuple(PartitionSpec(*[_AXIS] * stacked) for stacked in is_stacked)
        mapped = jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=specs,
            out_specs=PartitionSpec(_AXIS),
            # What a collective makes equal on all devices is stacked all the same.
            check_vma=False,
        )
        return jax.jit(mapped)

    def exchanged(self, array: jax.Array) -> jax.Array:
        """Inside of `compiled`: row i of every device comes together on device i.

        From (devices, ...) to (devices, ...), in the devices' order.
        """
        return jax.lax.all_to_all(array, _AXIS, 0, 0, tiled=True)


def in_groups(items: Iterable[Any], count: int) -> Iterator[tuple[Any, ...]]:
    """Lazily yields tuples of `count` items; the last tuple may have fewer."""
    remaining = iter(items)
    return iter(lambda: tuple(itertools.islice(remaining, count)), ())


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array placed, over the devices of all processes too.

    Args:
      leaf: an array; one in the memory of one process must be the same on all.
      sharding: the sharding of the result.

    Returns:
      The array.
    """
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if spread or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):  # NumPy has none
        words = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


@functools.partial(jax.jit, static_argnames=("count", "sharding"))
def _first(tree: Any, *, count: int, sharding: jax.sharding.Sharding) -> Any:
    part = jax.tree.map(lambda stack: stack[:count], tree)
    return jax.lax.with_sharding_constraint(part, sharding)


def _only(stack: jax.Array) -> jax.Array:
    return stack[0]
