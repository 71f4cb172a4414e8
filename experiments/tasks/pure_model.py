"""A Flax NNX module as pure functions of its parameters, nested dicts of arrays."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

from jaxprune.typing import Params

M = TypeVar("M", bound=nnx.Module)


class PureModel(Generic[M]):
    """A module whose parameters are handed in at every call."""

    def __init__(
        self,
        make: Callable[[nnx.Rngs], M],
        start: Callable[[], Params] | None = None,
    ) -> None:
        """Traces the module once; makes no parameters.

        Args:
          make: function that makes the module with random parameters.
          start: function that makes the parameters of every seed, in place of random
            ones.
        """
        self._make, self._start = make, start
        # Traced: shapes and structure without an array, so large models can be looked
        # at.
        model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graph, self._state = nnx.split(model, nnx.Param)

    def init(self, seed: int) -> Any:
        """Random parameters, or those to start from."""
        if self._start is not None:
            return self._start()
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(seed)), nnx.Param))

    @property
    def shapes(self) -> Any:
        """The parameters' shapes and types, as `jax.ShapeDtypeStruct`."""
        return nnx.to_pure_dict(self._state)

    def bind(self, params: Any) -> M:
        """The module with these parameters."""
        # By position: the leaves of a nested dict and of the state have one order.
        state = jax.tree.unflatten(
            jax.tree.structure(self._state), jax.tree.leaves(params)
        )
        return nnx.merge(self._graph, state)
