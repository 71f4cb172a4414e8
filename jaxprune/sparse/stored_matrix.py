"""Leaves that lie packed in a file, and are packed without ever being dense."""

import dataclasses
from collections.abc import Callable

from jaxprune.arrays.lazy import LazyArray
from jaxprune.sparse.encodings import DTYPES
from jaxprune.sparse.packed_matrix import PackedMatrix


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMatrix(LazyArray):
    """A matrix, or several, whose file has the kept values, or levels and scales.

    Attributes:
      packed: function of whether the last two axes are exchanged to the leaf packed;
        None where the file's form cannot be kept.
    """

    packed: Callable[[bool], PackedMatrix | None] = dataclasses.field(kw_only=True)


def recoded(packed: PackedMatrix | None, encoding: str | None) -> PackedMatrix | None:
    """A packed matrix with its values in another floating dtype.

    Args:
      packed: packed matrix, or None.
      encoding: encoding that is asked for; None for the one that it has.

    Returns:
      The matrix; None where that takes more than a cast.
    """
    if packed is None or encoding in (None, packed.encoding):
        return packed
    if encoding not in DTYPES or packed.scales is not None:
        return None
    values = packed.values.astype(DTYPES[encoding])
    return dataclasses.replace(packed, values=values, encoding=encoding)
