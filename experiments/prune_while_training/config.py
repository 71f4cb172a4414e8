"""What is asked for: the flags, and the cell that each trained model is."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.harness.option_rules import (
    at_least,
    check_lists,
    check_names,
    over_zero,
)
from experiments.prune_while_training.methods import DENSE, DENSE_SMALL, METHODS
from jaxprune.arrays import rules
from jaxprune.arrays.rules import Rule

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
      after_dense: updates of the dense model that it starts from; 0 for none.
      distill: weight of the divergence from the dense model; 0 for none.
    """

    method: str
    sparsity: float
    steps: int
    learning_rate: float
    seed: int
    after_dense: int = 0
    distill: float = 0.0

    @property
    def name(self) -> str:
        """Of its file."""
        # Only what is not the default: files of runs before these options keep their
        # names.
        more = f"-after-{self.after_dense}" if self.after_dense else ""
        more += f"-distill-{self.distill:g}" if self.distill else ""
        return (
            f"{self.method}-{self.sparsity:g}-steps-{self.steps}"
            f"-rate-{self.learning_rate:g}-seed-{self.seed}{more}"
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
      after_dense: 0 trains from nothing; else each run starts from the dense model of
        so many steps, and `steps` are those that follow.
      distill: weights, in [0, 1), of the divergence from the dense model of the seed:
        that of as many steps, or the one that is started from. 0 is none.
      batch_size: sequences in a batch; the preset's if left out.
      eval_tokens: validation tokens of every loss; 0 takes all.
      checkpoints: whether a cell that was stopped goes on from its last tenth, rather
        than from its start.
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
    after_dense: int = 0
    distill: tuple[float, ...] = (0.0,)
    batch_size: int | None = None
    eval_tokens: int = 0
    checkpoints: bool = False
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
        check_names(self, {"methods": METHODS})
        lists = ("methods", "sparsities", "steps", "seeds", "learning_rates", "distill")
        more = () if self.control_rates is None else ("control_rates",)
        check_lists(self, *lists, "tune_seeds", *more)
        rules.check(
            _RULES,
            steps=min(self.steps),
            after_dense=self.after_dense,
            eval_tokens=self.eval_tokens,
            batch_size=self.batch,
            seeds=min((*self.seeds, *self.tune_seeds)),
            from_dense=self.after_dense > 0,
            dense_small=DENSE_SMALL in self.methods,
            remaining=" ".join(name for name in self.methods if name != DENSE_SMALL),
            tune_sparsity=self.tune_sparsity,
        )
        for rate in (*self.learning_rates, *self.rates(DENSE)):
            rules.check([over_zero("learning_rates")], learning_rates=rate)
        for weight in self.distill:
            if not 0 <= weight < 1:
                raise ValueError(f"distill must be in [0, 1), got {weight}")

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


# Ten steps: the curve has a point each tenth, and a schedule's first event is at 5 %.
_RULES = (
    at_least("steps", 10),
    Rule(
        lambda v: v.after_dense == 0 or v.after_dense >= 10,
        "after_dense must be at least 10, got {after_dense}",
    ),
    *(at_least(name, 0) for name in ("eval_tokens", "seeds")),
    at_least("batch_size", 1),
    Rule(
        lambda v: not (v.from_dense and v.dense_small),
        f"{DENSE_SMALL} starts from weights of its own and not from a dense model, so "
        "after_dense takes none",
        "give --methods {remaining}",
    ),
    Rule(
        lambda v: 0 < v.tune_sparsity < 1,
        "tune_sparsity must be in (0, 1), got {tune_sparsity}",
    ),
)
