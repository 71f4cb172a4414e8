"""A torch module as a function of its parameters, which JAX can trace.

The parameters are a dictionary of JAX arrays by their torch names, tied ones once under
the first name. Buffers are constants as they are when the function is made. The module
runs as in eval mode, and is left as it was.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.arrays.messages import first_line, listed
from jaxprune.torch import conversion
from jaxprune.torch.calls import (
    arguments,
    attributes_kept,
    evaluating,
    running_parts,
    settings,
)
from jaxprune.torch.environment import (
    Limit,
    TracedTensor,
    device_module,
    environment,
    not_compiled,
    slow_attention,
    torch,
    torchax,
)

Arrays = dict[str, jax.Array]


def function(
    module: Any, example: Any
) -> tuple[Callable[[Mapping[str, Any], Any], Any], Arrays]:
    """A torch module as a JAX function of its parameters and a batch.

    The function can be jitted and differentiated, and is what `jp.trace`,
    `jp.axis_groups`, `jp.prune_trained` and `jp.shrink` take. It is traced once here,
    without computing anything, so that what JAX cannot run is refused at once.

    Args:
      module: any `torch.nn.Module`. It is used as it is whenever the function is
        called, so its structure must stay; its parameters may change, the function
        reads none of them.
      example: what the module is called with: a tensor; a tuple of positional
        arguments; or a dictionary of arguments by name. Entries of a dictionary that
        are no tensors (`use_cache=False`) are settings, with which every call is made.

    Returns:
      (fn, params): `fn(params, batch)` with a batch in the form of the example, of any
      size that the module takes (see `jp.torch.as_arrays`); it returns arrays in
      dictionaries (for a ModelOutput or dictionary) and tuples. And the parameters,
      {torch name: array}, in the dtypes of the module.

    Raises:
      ValueError: a parameter has a dtype that JAX, as it is set, has not.
      TypeError: the module's Python code depends on values, it writes into a tensor
        that is no part of the program, or torchax lacks an operation; the sentence
        names the operation and the submodule.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> fn, params = jp.torch.function(module, torch.ones(3, 4))
      >>> sorted(params)
      ['0.bias', '0.weight', '2.bias', '2.weight']
      >>> fn(params, jp.torch.as_arrays(torch.ones(5, 4))).shape
      (5, 2)
    """
    module_function = ModuleFunction(module, example)
    params = {
        name: conversion.as_array(parameter)
        # Of tied parameters it names the first alone.
        for name, parameter in module.named_parameters()
    }
    module_function.check_traceable(params, example)
    return module_function, params


class ModuleFunction:
    """The function that `jp.torch.function` returns."""

    def __init__(self, module: Any, example: Any) -> None:
        """Keeps the module, its buffers and the settings among the arguments."""
        if wrong := _recorded_parts(module):
            raise TypeError(
                "a module must consist of its layers, but torch.jit or torch.export "
                f"has recorded {listed(wrong)} as a program; give the module that it "
                "was made of"
            )
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"jp.torch takes a torch.nn.Module, got {module!r}")
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        wide = [n for n, t in tensors.items() if conversion.is_too_wide(t)]
        if wide:
            raise ValueError(
                "JAX rounds 64-bit floats to 32 bits unless jax_enable_x64 is set, "
                f"and {listed(wide)} have 64; call module.float(), or set "
                "jax_enable_x64"
            )
        if wrong := [n for n, t in tensors.items() if t.device.type == "meta"]:
            raise ValueError(
                f"parameters and buffers must have values, but {listed(wrong)} are on "
                "the device 'meta'; load the weights first"
            )
        environment()  # made outside of any trace
        self.module = module
        by_tensor: dict[int, list[str]] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            by_tensor.setdefault(id(tensor), []).append(name)
        self._tied = [*by_tensor.values()]  # the names of each parameter
        # Copies: a training that goes on changes the module's statistics.
        self.buffers: Arrays = {
            name: conversion.as_array(buffer) for name, buffer in module.named_buffers()
        }
        self.settings = settings(example)
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        # JAX multiplies numbers of several dtypes where torch refuses to.
        inputs = {t.dtype for t in _tensors(example) if t.is_floating_point()}
        if dtypes and not inputs <= dtypes:
            check_in_torch(module, example)

    def __call__(self, params: Mapping[str, Any], batch: Any) -> Any:
        """What the module gives, in eval mode.

        Args:
          params: {torch name: array}; buffers among them are used for the module's.
          batch: arguments in the form of the example.

        Returns:
          A pytree of arrays.

        Raises:
          ValueError: a parameter is missing or a name unknown.
        """
        self._check_names(params)
        with traced_call():
            tensors = _wrapped({**self.buffers, **params})
            args, kwargs = arguments(_wrapped(conversion.as_arrays(batch)))
            kwargs = {**self.settings, **kwargs}
            with evaluating(self.module), attributes_kept(self.module):
                # strict=False: a batch norm without statistics has None for buffers.
                result = torch.func.functional_call(
                    self.module, tensors, args, kwargs, tie_weights=True
                )
            environment().check_read(result)
            return conversion.as_result(result)

    def _check_names(self, params: Mapping[str, Any]) -> None:
        known = self.buffers.keys() | {*itertools.chain(*self._tied)}
        missing = [names[0] for names in self._tied if not params.keys() & {*names}]
        if wrong := [
            *(f"{name} is missing" for name in missing),
            *(f"{name} is unknown" for name in sorted(params.keys() - known)),
        ]:
            raise ValueError(
                f"the parameters of a module go by its own names, but {listed(wrong)}; "
                "give those that jp.torch.function returned"
            )

    def check_traceable(self, params: Mapping[str, Any], example: Any) -> None:
        """Traces the function once, abstractly.

        Args:
          params: {torch name: array}.
          example: arguments of the module.

        Raises:
          TypeError: JAX cannot trace it; see `function`.
        """
        batch = conversion.as_arrays(example)
        try:
            with environment().watching_views():
                jax.eval_shape(self, params, batch)
        except Exception as failure:
            # Hooks cost time, so they are set only where there is something to find.
            place = _failing_module(self, params, batch)
            explained, is_known = _explained(failure, place)
            if not is_known:
                # JAX's reason is a riddle where the example fits not the module.
                check_in_torch(self.module, example)
            raise explained from failure


@contextlib.contextmanager
def traced_call() -> Iterator[None]:
    """What holds while a module runs on JAX arrays."""
    # Shapes broadcast as torch's do, whatever is set for JAX. The gradient is JAX's:
    # torch's graph would only hold on to tracers.
    with (
        warnings.catch_warnings(),
        jax.numpy_rank_promotion("allow"),
        slow_attention(),
        torch.no_grad(),
        environment(),
        not_compiled(),
        device_module(),
    ):
        # Torch's default integers have 64 bits, and JAX's as many as it is set to.
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        yield


def _wrapped(arrays: Any) -> Any:
    """Arrays as torchax's tensors, in their containers."""
    env = environment()
    return jax.tree.map(lambda x: TracedTensor(jax.numpy.asarray(x), env), arrays)


def _failing_module(fn: ModuleFunction, params: Mapping[str, Any], batch: Any) -> str:
    """The innermost submodule in which a trace fails, by name; empty for the root."""
    with running_parts(fn.module) as running:
        environment().running = running  # for what is noted while it runs
        try:
            with environment().watching_views():
                jax.eval_shape(fn, params, batch)
        except Limit as failure:
            if failure.place is not None:
                return failure.place
        except Exception:
            pass  # the same as before, with the hooks
        finally:
            environment().running = ()
    return running[-1] if running else ""


def _recorded_parts(module: Any) -> list[str]:
    """Names of the parts that torch.jit or torch.export made: a program, no layers."""
    if not isinstance(module, torch.nn.Module):
        is_program = isinstance(module, torch.export.ExportedProgram)
        return ["the module itself"] * is_program
    return [
        name or "the module itself"
        for name, part in module.named_modules()
        # What torch.export made has methods that refuse to set a mode.
        if isinstance(part, torch.jit.ScriptModule) or "eval" in vars(part)
    ]


def _tensors(example: Any) -> list[Any]:
    leaves = jax.tree.leaves(example)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _as_tensor(leaf: Any) -> Any:
    is_array = isinstance(leaf, np.ndarray | jax.Array)
    return conversion.as_tensor(leaf) if is_array else leaf


def check_in_torch(module: Any, example: Any) -> None:
    """Runs a module in torch, where all of it and of its example are on the CPU.

    Args:
      module: torch module.
      example: arguments of it.

    Raises:
      TypeError: torch cannot run it on the example.
    """
    devices = {t.device.type for t in [*_tensors(example), *module.parameters()]}
    if not devices <= {"cpu"}:
        return
    args, kwargs = arguments(jax.tree.map(_as_tensor, example))
    try:
        with evaluating(module), torch.no_grad():
            module(*args, **kwargs)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {first_line(failure)}"
        raise TypeError(
            f"the module must run in torch on the example, but it does not ({reason}); "
            "give what module(...) takes, in its dtype"
        ) from failure


def _explained(failure: Exception, place: str) -> tuple[TypeError, bool]:
    """The error for a failed trace, and whether its reason is known."""
    by_values = isinstance(
        failure,
        jax.errors.ConcretizationTypeError
        | jax.errors.JAXIndexError
        | jax.errors.TracerArrayConversionError,
    )
    # JAX names its own reasons, and torchax an operation that it has not.
    known = True
    if isinstance(failure, Limit):
        sentence = failure.sentence
    elif isinstance(failure, torchax.tensor.OperatorNotFound):
        sentence = (
            "every operation of a module must be one that torchax has, but {operation} "
            "in {place!r} is not; write that part with other operations"
        )
    elif by_values:
        sentence = (
            "a traced module's Python code must not depend on values, but {operation} "
            "in {place!r} reads one; give what decides as a setting, or write that "
            "part without the question"
        )
    else:
        known = False
        reason = f"{type(failure).__name__}: {first_line(failure)}"
        reason = reason.replace("{", "{{").replace("}", "}}")
        sentence = (
            f"JAX cannot trace {{operation}} in {{place!r}} ({reason}); write that "
            "part with other operations"
        )
    operation = getattr(failure, "operation", "its Python code")
    place = place or "the module itself"
    return TypeError(sentence.format(operation=operation, place=place)), known
