"""torchax beside the torch that is installed: imported whole, and with two repairs.

torchax runs a torch program on JAX arrays, operation by operation. Release 0.0.13 names
overloads of named tensors that torch 2.13 no longer has, so they are answered while it
is imported. Pairs that the tests ran with: torch 2.13.0 and torchax 0.0.13.

Differences of `Environment` from torchax's own:
1. A tensor that the module keeps or makes on the CPU, and that meets a traced one, is a
   constant of the program; torchax refuses to mix them.
2. An operation that fails says its name, so that an error can name it.
3. Some operations that it lacks, or gets wrong, are there (`operations`).
4. What torchax would get wrong without a word is refused: random numbers, results that
   are written to `out=`, and, where it is watched, writes into views (`views`).
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxprune.torch import views
from jaxprune.torch.operations import OPERATIONS, REPAIRS
from jaxprune.torch.views import Limit

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
def _device_not_named() -> Iterator[None]:
    """Keeps torchax from giving torch a device "jax", which cannot be taken back.

    Afterwards torch would take it for the accelerator of the machine: `torch.compile`
    and `torch.nn.DataParallel` of any module of the process fail on it.
    """
    places = [(torch.utils, "rename_privateuse1_backend")]
    places += [(torch, "_register_device_module")]
    with contextlib.ExitStack() as stack:
        for place, name in places:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, lambda *_: None)
        yield


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
    # Who has imported it before may use its device.
    is_first = "torchax" not in sys.modules
    device = _device_not_named() if is_first else contextlib.nullcontext()
    try:
        with _missing_overloads_answered(), _settings_kept(), device:
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
    if is_first:
        # Torch imports this when it makes a tensor there; no attribute of torch has it.
        sys.modules.setdefault("torch.privateuseone", torchax.device_module)
        # Its tensors say "jax:0", a name that torch then does not know.
        for tensor_type in (torchax.tensor.Tensor, torchax.view.View):
            tensor_type.device = property(lambda _: torch.device("privateuseone:0"))
    return torchax


torchax: Any = _imported()
_Environment: Any = torchax.tensor.Environment
TracedTensor: Any = torchax.tensor.Tensor
TracedView: Any = torchax.view.View


class _DispatchMode(torchax.tensor.XLADispatchMode):  # type: ignore[misc]
    """torchax's mode, which asks the environment for operations of others too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation; a custom one is one that the environment lacks."""
        # torchax would call it on its tensors, whose refusal does not name it.
        if _traced_leaves((args, kwargs)) and func.namespace not in ("prim", "prims"):
            return self.env.dispatch(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Environment(_Environment):
    """torchax's environment with the differences that the module lists."""

    # Whether views are watched: links between tensors keep all of them in memory.
    watching = False
    running: Sequence[str] = ()
    """The submodules that run, the innermost last, while a failure is looked for."""

    def __init__(self) -> None:
        """Makes the environment, in which operations of any namespace are looked up."""
        super().__init__()
        self._dispatch_mode = _DispatchMode(self)

    def load_ops(self) -> None:
        """Loads torchax's operations, and those that it lacks."""
        super().load_ops()
        repaired = {
            name: functools.partial(
                repair, self._get_op_or_decomp(getattr(torch.ops.aten, name)).func
            )
            for name, repair in REPAIRS.items()
        }
        for name, function in (OPERATIONS | repaired).items():
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None:
                self._ops[packet.default] = torchax.ops.ops_registry.Operator(
                    packet.default,
                    function,
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
            self.check_read((args, kwargs))
            result = super().dispatch(func, types, args, kwargs)
            if self.watching:
                self._watch(func, args, result)
            return result
        except torchax.tensor.OperatorNotFound as failure:
            failure.operation = operation_name(func)
            raise
        except Exception as failure:
            # The innermost operation is the first to see the failure.
            if not hasattr(failure, "operation"):
                failure.operation = operation_name(func)  # type: ignore[attr-defined]
            raise

    def get_and_rotate_prng_key(self, generator: Any = None) -> Any:
        """Refuses random numbers: a function of JAX gives the same each time.

        Args:
          generator: torch's generator, or None.

        Raises:
          TypeError: always.
        """
        raise Limit(
            "a module must give the same for the same inputs, but {operation} in "
            "{place!r} draws random numbers; draw them outside, and give them as an "
            "argument"
        )

    def _is_same_device(self, the_tensor: Any, new_device: Any) -> bool:
        # As torchax has it for the name "jax": modes run on tensors without memory.
        if new_device == "meta" and isinstance(the_tensor, TracedTensor | TracedView):
            return True
        same: bool = super()._is_same_device(the_tensor, new_device)
        return same

    @contextlib.contextmanager
    def watching_views(self) -> Iterator[None]:
        """Refuses writes into views that are read elsewhere, inside of it.

        Yields:
          Nothing.
        """
        self.watching = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "watching", False)
            # torchax's own methods go past the dispatch.
            for name in ("flatten", "detach"):
                stack.callback(setattr, TracedTensor, name, vars(TracedTensor)[name])
                setattr(TracedTensor, name, getattr(torch.Tensor, name))
            yield

    def check_read(self, tree: Any) -> None:
        """Refuses what would have another value in torch, where views are watched.

        Args:
          tree: tensors in containers.

        Raises:
          Limit: memory that one of them shares in torch was written to.
        """
        if self.watching:
            views.check_views(_traced_leaves(tree))

    def _watch(self, func: Any, args: Any, result: Any) -> None:
        name = operation_name(func)
        views.note_views(name, args, _traced_leaves(result))
        schema = getattr(func, "_schema", None)
        # Of a function without a schema the name says it: "mul_", "__imul__".
        by_name = name.endswith("_") and (name[-2:] != "__" or name.startswith("__i"))
        if args and (schema.is_mutable if schema is not None else by_name):
            place = self.running[-1] if self.running else None
            views.note_write(name, place, args[0])

    def _without_mixture(self, func: Any, operands: Any) -> Any:
        """Operands that are all traced, where at least one of them is."""
        leaves = torch_tree.tree_leaves(operands)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        traced = [isinstance(leaf, TracedTensor | TracedView) for leaf in tensors]
        if any(traced) and operands[1].get("out") is not None:
            raise Limit(
                "a module must not have results written to out=, but {operation} in "
                "{place!r} has; take the result that the operation returns"
            )
        if not any(traced) or all(traced):
            return operands
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable and not traced[0]:
            # The constant's copy would change, and the module would never see it.
            raise Limit(
                "a module must not write into a tensor that it made on the CPU, but "
                "{operation} in {place!r} does; make it on the device of the inputs "
                "(device=x.device)"
            )
        return torch_tree.tree_map_only(torch.Tensor, self._as_traced, operands)

    def _as_traced(self, tensor: Any) -> Any:
        if isinstance(tensor, TracedTensor | TracedView):
            return tensor
        # Inside the environment's modes every operation would come back here.
        with torch._C.DisableTorchFunction(), torch.utils._mode_utils.no_dispatch():
            return TracedTensor(self.t2j_copy(tensor), self)


def _traced_leaves(tree: Any) -> list[Any]:
    leaves = torch_tree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, TracedTensor)]


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


def not_compiled() -> Any:
    """What `torch.compile` was put around runs operation by operation."""
    # Where nothing was compiled, the compiler need not be imported.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def device_module() -> Iterator[None]:
    """What torch.autocast asks about the device that traced tensors name."""
    # For the call alone: torch would take it for an accelerator that there is.
    if hasattr(torch, "privateuseone"):
        yield
        return
    torch.privateuseone = torchax.device_module
    try:
        yield
    finally:
        del torch.privateuseone


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
