"""A function whose pruned weights are read packed: `jp.pack`."""

import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.arrays import lazy, tree
from jaxprune.arrays.messages import listed
from jaxprune.graph.linear_ops import Trace, trace
from jaxprune.sparse import cpu_kernels, encodings, products
from jaxprune.sparse.encodings import DTYPES
from jaxprune.sparse.packed_function import PackedFunction
from jaxprune.sparse.packed_matrix import MOST, PackedMatrix, pack_matrix
from jaxprune.sparse.products import Use
from jaxprune.sparse.split_matrix import split_rows
from jaxprune.sparse.stored_matrix import StoredMatrix, recoded
from jaxprune.typing import Params

Values: TypeAlias = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""How kept values are stored."""


class PackResult(NamedTuple):
    """A packed model and the report of what was packed.

    Attributes:
      fn: the function, of packed parameters and a batch.
      params: parameters in the containers of the original ones, with a `PackedMatrix`
        in the place of a packed leaf, or a tuple of them where the function uses
        several parts, as the layers of a stack are.
      report: JSON-able: "weights" (name of a leaf to whether it is packed, the reason
        where not, matrices, zeros, encoding, and bytes before and after), "before" and
        "after" (bytes of all parameters), and "path" (what multiplies on this CPU).
    """

    fn: PackedFunction
    params: Params
    report: dict[str, Any]


def pack(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batch: Any,
    *,
    values: Values | Mapping[str, Values | None] | None = None,
    group: int = 128,
    dense: bool = False,
) -> PackResult:
    """The same function, with its weights stored without their zeros.

    Matmuls of a weight with an activation are found in the traced function. A weight
    becomes a `PackedMatrix` where that is smaller: a bit a weight, and the kept values.
    Everything else stays as it is, and the report says why. The result is that of the
    original function to float32 rounding, unless `values` rounds.

    A leaf that is split over a mesh is packed split by output: each device has its own
    rows, and no packed array moves.

    Where the distribution `jaxprune-kernels` is installed, a few vectors at a time are
    multiplied on CPU by kernels that read only what is stored, which is what makes
    decoding faster. Elsewhere, and on GPU and TPU, rows are expanded tile by tile: less
    memory, and no less time.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: a pytree of arrays or of `jp.LazyArray`, which are read one by one.
      batch: one batch, arrays or `jax.ShapeDtypeStruct`; others may have other shapes.
      values: encoding of the kept values: "float32", "bfloat16", "float16", "int8" or
        "int4", or {glob on names: encoding}; None for the weight's own dtype.
      group: number of inputs that share a scale, of "int8" and "int4": a multiple of
        16, or 0 for whole rows.
      dense: whether weights that are no smaller packed, having too few zeros, are
        stored whole for the kernels, which multiply bfloat16 faster than XLA does.

    Returns:
      `PackResult(fn, params, report)`.

    Raises:
      ValueError: an encoding, a group or a glob does not fit, or a weight is infinite
        in an encoding.
      TypeError: parameters are abstract.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.eye(64), "down": jnp.ones((64, 2))}
      >>> packed = jp.pack(fn, params, jnp.ones((1, 64)))
      >>> [name for name, row in packed.report["weights"].items() if row["packed"]]
      ['up']
      >>> packed.fn(packed.params, jnp.zeros((3, 64))).tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    names = tree.names(params)
    rules = values if isinstance(values, Mapping) else {"*": values}
    if not all(
        name in (None, *DTYPES, *encodings.BITS) for name in list(rules.values())
    ):
        raise ValueError(
            "values must be float32, bfloat16, float16, int8 or int4, got "
            f"{list(rules.values())}; leave it out to keep the weights as they are"
        )
    if not (isinstance(group, int) and group >= 0 and (group % 16 == 0)):
        raise ValueError(
            f"group must be a multiple of 16 inputs, or 0 for whole rows, got {group}; "
            "128 is usual"
        )
    leaves = tree.named_leaves(params)
    if wrong := [
        name
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)
    ]:
        raise TypeError(
            f"pack needs the weights themselves, but {listed(wrong)} are abstract; "
            "call it outside of jit, with arrays or jp.LazyArray"
        )
    encoding = dict(zip(names, tree.by_rule(rules, names, None, "values"), strict=True))
    # Without shardings, since what is packed lies on devices in another way.
    abstract = jax.tree.map(products.abstract, lazy.abstract(params))
    traced = trace(fn, abstract, jax.tree.map(products.abstract, batch))
    uses, reasons = _packable(traced, dense=dense)
    job = _Job(traced, leaves, uses)
    results, rows = [], {}
    for name, leaf in leaves.items():
        if name not in reasons:
            reasons[name] = job.pack(name, encoding[name], group, dense=dense)
        results.append(_in_place(job.matrices.get(name), leaf))
        rows[name] = job.row(name, reasons[name])
    structure = jax.tree.structure(params)
    report = {
        "weights": rows,
        "before": sum(row["before"] for row in rows.values()),
        "after": sum(row["after"] for row in rows.values()),
        "path": str(cpu_kernels.path()),
    }
    packed_fn = PackedFunction(fn, abstract, batch, traced, job.places)
    return PackResult(packed_fn, jax.tree.unflatten(structure, results), report)


def _in_place(packed: tuple[Any, ...] | None, leaf: Any) -> Any:
    """What stands in a leaf's place: itself, a matrix, or several."""
    if packed is None:
        return lazy.array(leaf)
    return packed[0] if len(packed) == 1 else packed


def _packable(
    traced: Trace, *, dense: bool
) -> tuple[dict[str, list[Use]], dict[str, str]]:
    """The uses of each leaf that is needed in no other way, and why others are not."""
    uses: dict[str, list[Use]] = {}
    for use in products.find_uses(traced):
        uses.setdefault(use.leaf, []).append(use)
    # Looked-up rows alone are no reason to pack: nothing is read that is not needed.
    linear = {op.leaf for op in traced.linear_ops}
    uses = {name: uses[name] for name in uses if name in linear or dense}
    while True:
        flat = [use for leaf_uses in uses.values() for use in leaf_uses]
        _, needed = products.live_steps(traced.program, flat)
        live = [name for name in uses if _number(traced, name) in needed]
        if not live:
            break
        for name in live:  # others may now be needed for them
            del uses[name]
    reasons = {
        name: _reason(traced, name) for name in traced.leaves if name not in uses
    }
    return uses, reasons


def _number(traced: Trace, name: str) -> int:
    return traced.program.leaves[traced.leaves[name]]


def _reason(traced: Trace, name: str) -> str:
    """Why a leaf is not packed, in a few words."""
    program, leaf = traced.program, traced.leaves[name]
    if len(program.avals[_number(traced, name)].shape) < 2:
        return "has less than two axes"
    if name in traced.unseen:
        return traced.unseen[name]
    # The first step that takes it and neither moves it nor is a product.
    positions = {use.position for use in products.find_uses(traced)}
    for position, step in enumerate(program.steps):
        views = [traced.views.get(x) for x in step.inputs if isinstance(x, int)]
        is_operand = any(view is not None and view.leaf == leaf for view in views)
        is_move = all(number in traced.views for number in step.outputs)
        if is_operand and not is_move and position not in positions:
            return f"is an operand of {step.primitive.name}"
    return "is a result of the function"


class _Job:
    """Packs the leaves of a trace one by one."""

    def __init__(
        self, traced: Trace, leaves: Mapping[str, Any], uses: Mapping[str, list[Use]]
    ) -> None:
        self._traced, self._leaves, self._uses = traced, leaves, uses
        self.matrices: dict[str, tuple[Any, ...]] = {}
        self.places: dict[str, dict[Hashable, int]] = {}

    def pack(self, name: str, encoding: Any, group: int, *, dense: bool) -> str:
        """Packs a leaf; gives the reason where it does not."""
        leaf, packed = self._leaves[name], list[Any]()
        avals, places = self._traced.program.avals, dict[Hashable, int]()
        for use in self._uses[name]:
            dtype = np.dtype(avals[use.value].dtype)
            if dtype.name not in DTYPES:
                return f"is {dtype.name} where it is multiplied"
            if math.prod(avals[use.value].shape) > MOST:
                return f"has more than {MOST} weights where it is multiplied"
        # Equal matrices are stored once, as those of a head and of its embedding are.
        digests: dict[Hashable, int] = {}
        for use in self._uses[name]:
            if use.key in places:
                continue
            content, matrix = self._matrix(use, encoding, group)
            if content not in digests:
                digests[content] = len(packed)
                packed.append(_on_devices(matrix(), leaf))
            places[use.key] = digests[content]
        smaller = sum(matrix.nbytes for matrix in packed) < _bytes(leaf)
        if not smaller and not dense:
            return "is no smaller packed"
        self.matrices[name], self.places[name] = tuple(packed), places
        return ""

    def _matrix(
        self, use: Use, encoding: Any, group: int
    ) -> tuple[Hashable, Callable[[], PackedMatrix]]:
        """What tells the matrix of a use from others of its leaf, and packs it."""
        leaf = self._leaves[use.leaf]
        transposed = products.leaf_order(self._traced, use)
        if isinstance(leaf, StoredMatrix) and transposed is not None:
            packed = leaf.packed(transposed)
            if (matrix := recoded(packed, encoding)) is not None:
                return transposed, lambda: matrix
        weight = products.operand(self._traced, use, self._leaves)
        rows = np.ascontiguousarray(use.matrix(_narrowed(weight, leaf.dtype)))
        content = hashlib.blake2b(rows.view(np.uint8).data).digest()
        pack_rows = functools.partial(pack_matrix, rows, values=encoding, group=group)
        return (rows.shape, rows.dtype.name, content), pack_rows

    def row(self, name: str, reason: str) -> dict[str, Any]:
        """The report's row of a leaf."""
        leaf, packed = self._leaves[name], self.matrices.get(name, ())
        kept = sum(matrix.kept for matrix in packed)
        size = sum(matrix.size for matrix in packed)
        return {
            "packed": bool(packed),
            "reason": reason,
            "matrices": len(packed),
            "zeros": 1 - kept / size if size else 0.0,
            "encoding": packed[0].encoding if packed else str(_dtype(leaf)),
            "before": _bytes(leaf),
            "after": sum(matrix.nbytes for matrix in packed) or _bytes(leaf),
        }


def _on_devices(packed: PackedMatrix, leaf: Any) -> Any:
    """A packed matrix on the devices of its leaf, its rows split if the leaf is."""
    sharding = getattr(leaf, "sharding", None)
    mesh: Any = getattr(sharding, "mesh", None)
    if not isinstance(sharding, NamedSharding) or mesh.size == 1:
        return packed
    axes = tuple(
        name
        for part in sharding.spec
        for name in ((part,) if isinstance(part, str) else part or ())
    )
    # Several matrices, of experts say, are whole on each device.
    if axes and len(packed.shape) == 2:
        return split_rows(packed, mesh, axes)
    return jax.device_put(packed, NamedSharding(mesh, PartitionSpec()))


def _narrowed(weight: np.ndarray, dtype: Any) -> np.ndarray:
    """A weight that was only made wider on its way, in the leaf's dtype."""
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES or dtype.itemsize >= weight.dtype.itemsize:
        return weight
    narrow = weight.astype(dtype)
    same = narrow.astype(weight.dtype).tobytes() == weight.tobytes()
    return narrow if same else weight


def _bytes(leaf: Any) -> int:
    return math.prod(np.shape(leaf)) * int(_dtype(leaf).itemsize)


def _dtype(leaf: Any) -> Any:
    """The dtype of a leaf, which may be a number of Python's or a random key."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
