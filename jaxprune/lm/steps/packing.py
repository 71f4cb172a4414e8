"""The options of a packed model, and how a job reads one."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.finite import check_names
from jaxprune.lm.models.loaded_model import LoadedModel, device_mesh, open_model
from jaxprune.lm.packing.packed_decoder import pack_decoder
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.opening import read_dense
from jaxprune.lm.steps.option_rules import idle_without
from jaxprune.lm.steps.option_types import UNSET, Switch, choice_of
from jaxprune.lm.steps.settings import Loading

Values: TypeAlias = Literal["float32", "bfloat16", "int8", "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Matrices without their zeros.

    Attributes:
      packed: keep the matrices packed in memory, a bit for each weight and those that
        are not zero. Decoding on a CPU is faster where jaxprune-kernels is installed.
      values: how the weights that are not zero are kept. If left out, as they are
        stored: levels of int8 and int4 stay those levels. int8 and int4 round other
        weights to the nearest level.
    """

    packed: Switch = False
    values: Annotated[Values | None, choice_of(Values), UNSET] = None


PACKING_RULES = (
    idle_without(Packing, "values", "packed", "--packed, whose weights it is about"),
)
"""What the options keep."""


def open_packable(
    source: CheckpointDir, loading: Loading, packing: Packing
) -> LoadedModel:
    """The model of a directory or a compact file, still in its files.

    Args:
      source: directory, or compact file.
      loading: settings of the model. Packed, its parameters stay as they are stored,
        and the dtype is that of the products.
      packing: settings that say whether it is packed.

    Returns:
      The model.
    """
    return open_model(
        source,
        dtype=None if packing.packed else loading.dtype,
        compute_dtype=loading.dtype,
        mesh=device_mesh(loading.mesh),
        ignore_config=loading.ignore_config,
    )


def read_decoder(
    model: LoadedModel, source: CheckpointDir, packing: Packing, console: Console
) -> tuple[Any, dict[str, Any] | None]:
    """Reads a model's parameters, packed if that is asked for; they must be finite.

    Args:
      model: model whose parameters are still in its files.
      source: directory or compact file that it was opened from.
      packing: settings that say whether it is packed.
      console: where it says what it packed.

    Returns:
      The `Decoder` or `PackedDecoder`, and a record of the packing or None.

    Raises:
      ValueError: a tensor holds NaN or infinity; the sentence names all such.
    """
    if not packing.packed:
        return read_dense(model).decoder(), None
    packed = pack_decoder(model, source, values=packing.values)
    check_names(
        tensor
        for name, leaf in packed.leaves.items()
        if not _is_finite(leaf)
        for tensor in model.names[name].names
    )
    record = describe_packing(packed.report)
    console.note(packing_line(record))
    return packed.decoder, record


def _is_finite(leaf: Any) -> bool:
    """Whether the values and scales of a leaf, packed or not, are finite."""
    return all(
        bool(jnp.isfinite(array).all())
        for array in jax.tree.leaves(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating)
    )


def describe_packing(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the report of `jp.pack`.

    Args:
      report: report of a packed model.

    Returns:
      JSON-able: "packed" (number of weights' leaves), "before" and "after" (bytes of
      the parameters), "encodings", "path", and "unpacked", name to reason of each leaf
      of two axes that stays.
    """
    rows = report["weights"]
    packed = {name: row for name, row in rows.items() if row["packed"]}
    return {
        "packed": len(packed),
        "before": report["before"],
        "after": report["after"],
        "encodings": sorted({row["encoding"] for row in packed.values()}),
        "path": report["path"],
        "unpacked": {
            name: row["reason"]
            for name, row in rows.items()
            if not row["packed"] and row["reason"] != "has less than two axes"
        },
    }


def packing_line(record: Mapping[str, Any]) -> str:
    """The record of a packing, as a line."""
    return (
        f"{record['packed']} matrices packed ({', '.join(record['encodings'])}): "
        f"{record['after']:,} bytes of {record['before']:,}; multiplied by "
        f"{record['path']}"
    )
