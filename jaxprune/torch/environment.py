"""torchax beside the torch that is installed: imported whole, and with two repairs.

torchax runs a torch program on JAX arrays, operation by operation. Release 0.0.13 names
overloads of named tensors that torch 2.13 no longer has, so they are answered while it
is imported. Pairs that the tests ran with: torch 2.13.0 and torchax 0.0.13.

Differences of `Environment` from torchax's own:
1. A tensor that the module keeps or makes on the CPU, and that meets a traced one, is a
   constant of the program; torchax refuses to mix them.
2. An operation that fails says its name, so that an error can name it.
3. The grouped product of mixtures of experts is there, as JAX's ragged product.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays.rules import Rule, error

try:
    import torch
    from torch.utils import _pytree as torch_tree
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"jp.torch needs the package {missing.name!r}, which is not installed; "
        "pip install '.[torch]'"
    ) from missing


class _MissingOverload:
    """Stands for an overload that this torch no longer has: no program calls it."""


@contextlib.contextmanager
def _missing_overloads_answered() -> Iterator[None]:
    """Answers names of overloads that are gone, while torchax lists them."""
    packet_type = torch._ops.OpOverloadPacket
    getter = packet_type.__getattr__

    def answer(packet: Any, name: str) -> Any:
        try:
            return getter(packet, name)
        except AttributeError:
            # Attributes that Python itself looks up must still be missing.
            if name.startswith("__"):
                raise
            return _MissingOverload()

    packet_type.__getattr__ = answer  # type: ignore[method-assign]
    try:
        yield
    finally:
        packet_type.__getattr__ = getter  # type: ignore[method-assign]


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Puts back what importing torchax sets for the whole process."""
    variable = "ENABLE_RUNTIME_UPTIME_TELEMETRY"
    option = "jax_pjrt_client_create_options"
    telemetry, client = os.environ.get(variable), getattr(jax.config, option, None)
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        if telemetry is None:
            os.environ.pop(variable, None)
        if getattr(jax.config, option, None) != client:
            jax.config.update(option, client)


def _imported() -> Any:
    try:
        with _missing_overloads_answered(), _settings_kept():
            import torchax
            import torchax.decompositions  # lists the overloads
            import torchax.ops.ops_registry
            import torchax.tensor
            import torchax.view
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"jp.torch needs the package {missing.name!r}, which is not installed; "
            "pip install '.[torch]'"
        ) from missing
    return torchax


torchax: Any = _imported()
_Environment: Any = torchax.tensor.Environment
TracedTensor: Any = torchax.tensor.Tensor
TracedView: Any = torchax.view.View


class Environment(_Environment):
    """torchax's environment with the differences that the module lists."""

    def load_ops(self) -> None:
        """Loads torchax's operations, and those that it lacks."""
        super().load_ops()
        if hasattr(torch.ops.aten, "_grouped_mm"):
            operation = torch.ops.aten._grouped_mm.default
            self._ops[operation] = torchax.ops.ops_registry.Operator(
                operation,
                _grouped_product,
                is_jax_function=True,
                is_user_defined=True,
                needs_env=False,
                is_view_op=False,
            )

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Runs one operation on JAX arrays.

        Args:
          func: torch function or overload.
          types: classes of the tensors, as torch hands them over.
          args: positional operands.
          kwargs: operands by name, or None.

        Returns:
          What the operation gives, in traced tensors.
        """
        operands = (args, kwargs or {})
        try:
            args, kwargs = self._without_mixture(func, operands)
            return super().dispatch(func, types, args, kwargs)
        except torchax.tensor.OperatorNotFound as failure:
            failure.operation = operation_name(func)
            raise
        except Exception as failure:
            # The innermost operation is the first to see the failure.
            if not hasattr(failure, "operation"):
                failure.operation = operation_name(func)  # type: ignore[attr-defined]
            raise

    def _without_mixture(self, func: Any, operands: Any) -> Any:
        """Operands that are all traced, where at least one of them is."""
        leaves = torch_tree.tree_leaves(operands)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        traced = [isinstance(leaf, TracedTensor | TracedView) for leaf in tensors]
        if not any(traced) or all(traced):
            return operands
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable and not traced[0]:
            # The constant's copy would change, and the module would never see it.
            raise error(_WRITTEN_CONSTANT)
        return torch_tree.tree_map_only(torch.Tensor, self._as_traced, operands)

    def _as_traced(self, tensor: Any) -> Any:
        if isinstance(tensor, TracedTensor | TracedView):
            return tensor
        # Inside the environment's modes every operation would come back here.
        with torch._C.DisableTorchFunction(), torch.utils._mode_utils.no_dispatch():
            return TracedTensor(self.t2j_copy(tensor), self)


def _grouped_product(
    rows: jax.Array,
    weights: jax.Array,
    ends: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Rows times the weights of their expert: (rows, in), (experts, in, out).

    Only what mixtures of experts call: rows that lie expert by expert, each expert's up
    to its entry of `ends`.
    """
    if ends is None or rows.ndim != 2 or weights.ndim != 3 or bias is not None:
        raise NotImplementedError(
            "a grouped product is understood of rows (rows, in), weights (experts, in, "
            f"out) and the ends of groups, got {rows.shape} and {weights.shape}"
        )
    counts = jnp.diff(ends, prepend=0).astype(jnp.int32)  # (experts,)
    return jax.lax.ragged_dot(rows, weights, counts)  # (rows, out)


def operation_name(func: Any) -> str:
    """The name of a torch operation: "aten::nonzero", "item".

    Args:
      func: torch function or overload.

    Returns:
      Its name.
    """
    name = getattr(func, "name", None)
    return str(name()) if callable(name) else getattr(func, "__name__", str(func))


@functools.cache
def environment() -> Environment:
    """The one environment of this package; torchax's default one is left alone.

    Returns:
      The environment, made at the first call.
    """
    return Environment()


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Without torch's fused encoder layers, which take no other tensors than its own.

    Yields:
      Nothing.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


_WRITTEN_CONSTANT = Rule(
    lambda v: False,
    "a module must not write into a tensor that it made on the CPU",
    "make it on the device of the inputs (device=x.device)",
    error=TypeError,
)
