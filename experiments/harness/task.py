"""What an experiment trains, prunes and measures, as the stages of a run see it."""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax

import jaxprune as jp
from experiments.harness import training
from experiments.harness.optimizer import frozen, optimizer
from jaxprune.arrays.low_bit import Storage
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


class Task:
    """A model and its data; one program is compiled for each task.

    Attributes:
      model: a `PureModel`.
      allocations: by the names that results use: how weights are ranked, and which.
      looks: how models are measured.
      begins_trained: whether `init` is a trained model, which is measured before
        anything else.
      frozen: globs of the leaves that are not trained.
      ranks_frozen: whether criteria rank frozen leaves too, so that they are tracked.
      rank: rank of LoRA's change of each matrix; None trains in full.
      storage: how averages are held.
      write: (leaves by name, place, provenance) writes a directory with these leaves;
        None where no directory was read.
      length: tokens of a sequence.
    """

    model: Any
    looks: Looks = Looks()
    begins_trained: ClassVar[bool] = False
    frozen: tuple[str, ...] = ()
    ranks_frozen: ClassVar[bool] = False
    rank: int | None = None
    storage: Storage = "float32"
    write: Callable[[Mapping[str, jax.Array], Path, Mapping[str, Any]], None] | None = (
        None
    )

    @property
    def allocations(self) -> Mapping[str, tuple[jp.allocation.Name, Prunable]]:
        """All matrices together, and each alone."""
        rule = jp.tree.prunable
        return {"global": ("global", rule), "layer": ("layer", rule)}

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        raise NotImplementedError

    @property
    def shapes(self) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s; makes none."""
        shapes: Params = self.model.shapes
        return shapes

    def init(self, seed: int) -> Params:
        """The parameters before the first step."""
        params: Params = self.model.init(seed)
        return params

    def trained(self, name: str) -> bool:
        """Whether a leaf is trained."""
        return not any(fnmatch.fnmatchcase(name, glob) for glob in self.frozen)

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, *, track: Collection[str]
    ) -> optax.GradientTransformation:
        """AdamW of the leaves that are trained, holding these averages of them."""
        chosen = self.trained if self.frozen else None
        return optimizer(
            learning_rate,
            track=track,
            trained=chosen,
            watched=None if self.ranks_frozen else chosen,
            rank=self.rank,
            targets=next(iter(self.allocations.values()))[1],
            storage=self.storage,
        )

    def token_losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Nats of each target, of the targets' shape."""
        raise NotImplementedError

    def loss(self, params: Params, inputs: Any, targets: Any, key: Any) -> jax.Array:
        """Mean nats of the targets of a training batch; those below 0 do not count."""
        params = frozen(params, self.trained)
        losses = self.token_losses(params, inputs, targets)  # (batch, time)
        return losses.sum() / (targets >= 0).sum()

    def batches(self, batch_size: int, seed: int) -> training.Batches:
        """Step to its batch, a pure function."""
        raise NotImplementedError

    def validation(
        self, batch_size: int, limit: int | None
    ) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """Inputs, targets and weights, of one shape, for at most `limit` tokens."""
        raise NotImplementedError

    def shown(self, params: Params, label: str, length: int) -> dict[str, Any]:
        """A sample of what the model does: "label", "text" and what else there is."""
        raise NotImplementedError

    def measured(self, params: Params, loss: float, mean: Mean) -> dict[str, Any]:
        """What else is measured of a model with this validation loss; JSON-able."""
        return {}

    def save(self, params: Params, out: Path, provenance: Mapping[str, Any]) -> None:
        """Writes a directory like the one the model came from, if it came from one."""
        if self.write is None:
            return
        # LoRA changed matrices only; the others keep their bytes in the directory.
        low_rank = next(iter(self.allocations.values()))[1] if self.rank else None
        changed = {
            name: leaf
            for name, leaf in jp.tree.named_leaves(params).items()
            if self.trained(name) and (low_rank is None or low_rank(name, leaf))
        }
        self.write(changed, out, provenance)

    def solved(
        self,
        params: Params,
        *,
        method: Any,
        seed: int,
    ) -> Params:
        """The parameters after `jp.prune_trained`, where solvers can be asked for.

        Args:
          params: trained parameters.
          method: pass of `jp.passes` with its sparsity and allocation.
          seed: seed of the training run, which draws the calibration sequences too.
        """
        raise NotImplementedError
