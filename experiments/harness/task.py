"""What an experiment trains, prunes and measures, as the stages of a run see it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

import jaxprune as jp
from experiments.harness import training
from jaxprune.typing import Params, Prunable

Mean = Callable[[Any, list[tuple[Any, np.ndarray, np.ndarray]]], float]
"""(params, windows) to the mean nats of their targets, as `make_eval` gives."""


class Looks(NamedTuple):
    """How a model is measured.

    Attributes:
      batch: sequences measured at a time.
      times: looks at the validation loss while the dense model trains.
      tokens: number of tokens of the validation set at each of these, at most.
    """

    batch: int = 64
    times: int = 40
    tokens: int = 16_384


class Task(Protocol):
    """A model and its data; hashable. Parameters are any tree of arrays."""

    def __hash__(self) -> int:
        """One program is compiled for each task."""

    @property
    def allocations(self) -> Mapping[str, tuple[jp.allocation.Name, Prunable]]:
        """By the names that results use: how weights are ranked, and which."""

    @property
    def looks(self) -> Looks:
        """How its models are measured."""

    @property
    def begins_trained(self) -> bool:
        """Whether `init` is a trained model, which is measured before anything else."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    @property
    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s; makes none."""

    def init(self, seed: int) -> Params:
        """The parameters before the first step."""

    def loss(self, params: Params, inputs: Any, targets: Any, key: Any) -> jax.Array:
        """Mean nats of the targets of a training batch."""

    def token_losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Nats of each target, of the targets' shape."""

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, *, track: Collection[str]
    ) -> optax.GradientTransformation:
        """What trains it, holding these averages; as `harness.optimizer`."""

    def batches(self, batch_size: int, seed: int) -> training.Batches:
        """Step to its batch, a pure function.

        Raises:
          ValueError: there is too little data for one.
        """

    def validation(
        self, batch_size: int, limit: int | None
    ) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """Inputs, targets and weights, of one shape, for at most `limit` tokens.

        Raises:
          ValueError: there is too little data.
        """

    def shown(self, params: Params, label: str, length: int) -> dict[str, Any]:
        """A sample of what the model does: "label", "text" and what else there is."""

    def measured(self, params: Params, loss: float, mean: Mean) -> dict[str, Any]:
        """What else is measured of a model with this validation loss; JSON-able."""

    def save(self, params: Params, out: Path, provenance: Mapping[str, Any]) -> None:
        """Writes a pruned model for others to load, where the task knows a format."""


class Solvable(Task, Protocol):
    """A task whose models solvers can prune, from calibration sequences of its own."""

    def solved(
        self,
        params: Params,
        *,
        method: Any,
        sparsity: float,
        allocation: Any,
        seed: int,
    ) -> Params:
        """The parameters after `jp.prune_trained`.

        Args:
          params: trained parameters.
          method: pass of `jp.passes`.
          sparsity: share of the weights to remove, in (0, 1).
          allocation: rule of `jp.allocation`.
          seed: seed of the training run, which draws the calibration sequences too.
        """
