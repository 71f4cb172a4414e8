"""Leaves that lie packed in a file, and are packed without ever being dense."""

import dataclasses
from collections.abc import Callable

from jaxprune.arrays.lazy import LazyArray
from jaxprune.sparse.encodings import DTYPES
from jaxprune.sparse.packed_matrix import PackedMatrix


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMatrix(LazyArray):
    """A leaf of two axes whose file has its kept values, or its levels and scales.

    Attributes:
      packed: function of whether the leaf is transposed to the packed matrix of it.
    """

    packed: Callable[[bool], PackedMatrix] = dataclasses.field(kw_only=True)


def recoded(packed: PackedMatrix, encoding: str | None) -> PackedMatrix | None:
    """A packed matrix with its values in another floating dtype.

    Args:
      packed: packed matrix.
      encoding: encoding that is asked for; None for the one that it has.

    Returns:
      The matrix; None where that takes more than a cast.
    """
    if encoding in (None, packed.encoding):
        return packed
    if encoding not in DTYPES or packed.scales is not None:
        return None
    values = packed.values.astype(DTYPES[encoding])
    return dataclasses.replace(packed, values=values, encoding=encoding)
