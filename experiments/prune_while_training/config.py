"""What is asked for: the flags, and the cell that each trained model is."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.prune_while_training.methods import DENSE, METHODS

_BATCH = {"tiny": 6, "cpu": 12, "medium": 16, "char": 64}  # sequences


@dataclasses.dataclass(frozen=True)
class Cell:
    """One trained model.

    Attributes:
      method: a name of `METHODS`.
      sparsity: the fraction of the decoder's matrices that is removed at the end; of
        "dense" it is 0, and of "dense_small" that of the run whose size it has.
      steps: updates.
      learning_rate: the peak.
      seed: seed of the parameters and the batches.
    """

    method: str
    sparsity: float
    steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return (
            f"{self.method}-{self.sparsity:g}-steps-{self.steps}"
            f"-rate-{self.learning_rate:g}-seed-{self.seed}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains with a rising sparsity by several methods, and dense by the same recipe.

    Attributes:
      out: directory of the results; what is found there is not done again.
      preset: size of the model.
      data: "shakespeare_plays" (offline) or "tiny_shakespeare_char".
      text: a text file, or a directory of them, in place of a data set.
      data_dir: where data sets are kept.
      methods: names of `METHODS`; the dense control is always done.
      sparsities: final fractions of the decoder's matrices removed.
      steps: lengths of training, each with a cosine of its own.
      seeds: one run each.
      learning_rates: peaks to choose from, for each method and each length.
      control_rates: those of the dense control; `learning_rates` if left out.
      tune_sparsity: the sparsity at which the peak is chosen.
      tune_seeds: the seeds of whose losses the lowest mean chooses it.
      batch_size: sequences in a batch; the preset's if left out.
      eval_tokens: validation tokens of every loss; 0 takes all.
      mesh: how the devices share the work, as in `scaled_down_llm`.
    """

    out: Path = Path("results/prune_while_training")
    preset: Literal["tiny", "cpu", "medium", "char"] = "tiny"
    data: str = "shakespeare_plays"
    text: Path | None = None
    data_dir: Path | None = None
    methods: tuple[str, ...] = (
        *("dense_small", "gradual_magnitude", "gradual_preconditioned"),
        *("gradual_preconditioned_late", "ste_magnitude", "ste_preconditioned"),
    )
    sparsities: tuple[float, ...] = (0.9, 0.8, 0.6, 0.95)
    steps: tuple[int, ...] = (1000, 4000)
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (8e-3, 4e-3, 16e-3)
    control_rates: tuple[float, ...] | None = None
    tune_sparsity: float = 0.9
    tune_seeds: tuple[int, ...] = (0,)
    batch_size: int | None = None
    eval_tokens: int = 0
    mesh: str | None = None

    @property
    def batch(self) -> int:
        """Sequences in a batch."""
        return _BATCH[self.preset] if self.batch_size is None else self.batch_size

    def check(self) -> None:
        """Refuses what could only fail later.

        Raises:
          ValueError: a name is unknown, a number out of range, or a list empty.
        """
        lists = ("methods", "sparsities", "steps", "seeds", "learning_rates")
        for name in (*lists, "tune_seeds"):
            values = getattr(self, name)
            if not values or len({*values}) != len(values):
                raise ValueError(f"{name} must be named once each, got {values}")
        if unknown := {*self.methods} - {*METHODS}:
            raise ValueError(
                f"methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}"
            )
        for share in (*self.sparsities, self.tune_sparsity):
            if not 0 < share < 1:
                raise ValueError(f"sparsities must be in (0, 1), got {share}")
        # The curve has a point each tenth, and a schedule's first event is at 5 %.
        if not min(self.steps) >= 10:
            raise ValueError(f"steps must be at least 10, got {min(self.steps)}")
        for rate in (*self.learning_rates, *self.rates(DENSE)):
            if not rate > 0:
                raise ValueError(f"learning_rates must be over 0, got {rate}")

    def rates(self, method: str) -> tuple[float, ...]:
        """The peaks to choose from."""
        if method == DENSE and self.control_rates is not None:
            return self.control_rates
        return self.learning_rates

    def names(self) -> list[str]:
        """The methods, the dense control first."""
        # The control first: a method may start from it, and all are measured against
        # it.
        return list(dict.fromkeys((DENSE, *self.methods)))
