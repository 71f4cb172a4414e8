"""A mesh of devices from the words of a flag: axes and sizes, "data=2,fsdp=4"."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh


def parse_mesh(text: str, names: Sequence[str]) -> dict[str, int]:
    """The axes that a flag asks for, in the order they were given.

    Args:
      text: axes and sizes.
      names: names of the axes that there may be.

    Returns:
      Name to size, 1 or more.

    Raises:
      ValueError: the text is no such list.

    Example:
      >>> parse_mesh("data=2,fsdp=4", ("data", "fsdp"))
      {'data': 2, 'fsdp': 4}
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in names or name in axes or not size.isdecimal() or not int(size):
            example = ",".join(f"{n}={k}" for n, k in ((names[0], 4), (names[-1], 2)))
            raise ValueError(
                f"--mesh must name each of {', '.join(names)} once at most, with a "
                f"size of 1 or more, as in {example}, got '{part}' in '{text}'"
            )
        axes[name] = int(size)
    return axes


def mesh_words(axes: Mapping[str, int]) -> str:
    """The axes as an error calls them."""
    return f"the mesh {','.join(f'{name}={size}' for name, size in axes.items())}"


def check_devices(axes: Mapping[str, int]) -> None:
    """Refuses axes that the devices of all processes cannot make up.

    Args:
      axes: sizes by name.

    Raises:
      ValueError: there are fewer devices, or several processes have more.
    """
    mesh = mesh_words(axes)
    count = math.prod(axes.values())
    devices = len(jax.devices())
    processes = jax.process_count()
    if not count <= devices:
        raise ValueError(
            f"{mesh} needs {count} devices, got {devices}; give smaller sizes"
        )
    if processes != 1 and count != devices:
        raise ValueError(
            f"{mesh} must have all {devices} devices of {processes} processes, got "
            f"{count}; give a --mesh of all, and a batch size that it divides"
        )


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """The mesh, of Auto axes, over the first devices."""
    devices = jax.devices()[: math.prod(axes.values())]
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices
    )
