"""Pruned weights of a torch module that stay zero while it trains.

A parameter keeps its name and its place: its gradient is masked when it is accumulated,
so that the moments of an optimizer stay zero too, and the weight is masked after each
step of any `torch.optim` optimizer, whatever its moments held before. State
dictionaries, tied weights and `save_pretrained` see plain parameters with zeros;
`torch.nn.utils.prune` would rename them to `weight_orig` and break all three.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import optax
from torch.optim.optimizer import register_optimizer_step_post_hook

from jaxprune.arrays.messages import listed
from jaxprune.torch import conversion
from jaxprune.torch.environment import torch
from jaxprune.torch.loading import misshapen


def hold(module: Any, masks: Mapping[str, Any]) -> "HeldMasks":
    """Zeros the weights that masks prune, and keeps them zero while torch trains.

    It may be called before or after the optimizer is made, and works inside trainers
    that make their own, as `transformers.Trainer`. The zeros are in the parameters
    themselves, so nothing has to be made permanent: save the module as ever.

    Args:
      module: the module, whose parameters are not frozen later than this call.
      masks: {torch name: booleans of the parameter's shape}, False where it is pruned;
        one that is not there, or has None or `optax.MaskedNode()`, is left alone.

    Returns:
      A handle: `remove()` ends it, and so does leaving it as a context.

    Raises:
      ValueError: a name is none of a parameter, or a mask is not boolean or has another
        shape; all of them are named.

    Example:
      >>> import jaxprune as jp
      >>> import torch
      >>> module = torch.nn.Linear(4, 2)
      >>> fn, params = jp.torch.function(module, torch.ones(3, 4))
      >>> masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
      >>> optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
      >>> with jp.torch.hold(module, masks):
      ...     for _ in range(3):
      ...         optimizer.zero_grad()
      ...         module(torch.ones(3, 4)).square().mean().backward()
      ...         optimizer.step()
      >>> int((module.weight == 0).sum())
      4
    """
    parameters = dict(module.named_parameters())
    arrays = {
        name: _as_boolean(mask)
        for name, mask in masks.items()
        if mask is not None and not isinstance(mask, optax.MaskedNode)
    }
    unknown = sorted(arrays.keys() - parameters.keys())
    others = sorted(n for n, a in arrays.items() if a.dtype != np.bool_)
    problems = [
        *(f"{name} is no parameter" for name in unknown),
        *(f"{name} is not boolean" for name in others),
        *misshapen(arrays, parameters),
    ]
    if problems:
        raise ValueError(
            "hold takes boolean masks by the names and shapes of the parameters, but "
            f"{listed(problems)}; make them of the parameters of "
            "jp.torch.function(module, example)"
        )
    # Tensors of their own: the caller may change the masks afterwards.
    return HeldMasks(module, {name: torch.tensor(arrays[name]) for name in arrays})


class HeldMasks:
    """Masks of parameters that torch trains, from `jp.torch.hold`."""

    def __init__(self, module: Any, masks: Mapping[str, Any]) -> None:
        """Masks the weights, and hooks gradients and optimizer steps.

        Args:
          module: the module.
          masks: name of a parameter to a boolean tensor of its shape.
        """
        self._module, self._masks = module, masks
        self._held: dict[str, tuple[Any, Any]] = {}  # parameter and its hook
        # Of every optimizer, since a trainer makes its own after this call.
        self._handle = register_optimizer_step_post_hook(self._after_step)
        self.apply()

    def apply(self) -> None:
        """Zeros the pruned weights now, as after `load_state_dict` with others."""
        # `.data`: a graph that is waiting for its backward pass must not notice.
        for parameter, mask in self._parameters():
            _zero_pruned(parameter.data, mask)

    def _parameters(self) -> list[tuple[Any, Any]]:
        """Each parameter with its mask; one that has taken its place is hooked."""
        parameters = dict(self._module.named_parameters())
        for name, mask in self._masks.items():
            before, hook = self._held.get(name, (None, None))
            parameter = parameters.get(name, before)
            if parameter is before:
                continue
            if hook is not None:
                hook.remove()
            # After accumulation, so that several backward passes into one gradient and
            # whatever a trainer does to it before the step see zeros. A frozen one has
            # no gradient to mask.
            hook = parameter.requires_grad and (
                parameter.register_post_accumulate_grad_hook(_GradientMask(mask))
            )
            self._held[name] = parameter, hook or None
        return [(self._held[name][0], mask) for name, mask in self._masks.items()]

    def remove(self) -> None:
        """Lets go: zeros stay as they are, and may train from here on."""
        for handle in (self._handle, *(hook for _, hook in self._held.values())):
            if handle is not None:
                handle.remove()

    def __enter__(self) -> "HeldMasks":
        """The handle itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go."""
        self.remove()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # The hook sees every optimizer of the process; those of others are not touched.
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, mask in self._parameters():
            if id(parameter) in stepped:
                _zero_pruned(parameter.data, mask)


class _GradientMask:
    """Zeros the accumulated gradient of pruned weights."""

    def __init__(self, mask: Any) -> None:
        self._mask = mask

    def __call__(self, parameter: Any) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            # Some rows of it: of an embedding with sparse=True.
            gradient = parameter.grad.coalesce()
            rows = self._mask.to(gradient.device)[gradient.indices()[0]]
            _zero_pruned(gradient.values(), rows)
            parameter.grad = gradient
        elif parameter.grad is not None:
            _zero_pruned(parameter.grad, self._mask)


def _zero_pruned(tensor: Any, mask: Any) -> None:
    # Not a product: 0 times an infinite or undefined gradient would be NaN.
    with torch.no_grad():
        # The module may have moved to another device since.
        tensor.masked_fill_(~mask.to(tensor.device), 0)


def _as_boolean(mask: Any) -> np.ndarray:
    if isinstance(mask, torch.Tensor):
        return conversion.as_numpy(mask)
    return np.asarray(jax.device_get(mask))
