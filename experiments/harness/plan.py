"""The numbers that fix what a run of the sweep computes."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from experiments.harness.criteria import CRITERIA, GRADUAL
from experiments.harness.solvers import SOLVERS, named


class Cell(NamedTuple):
    """One way to prune.

    Attributes:
      criterion: name in `CRITERIA`.
      allocation: name of one of the task's allocations.
      sparsity: the share of the allocation's weights to remove.
    """

    criterion: str
    allocation: str
    sparsity: float

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.criterion}-{self.allocation}-{self.sparsity}"

    @property
    def label(self) -> str:
        """For readers."""
        return f"{self.criterion}, {100 * self.sparsity:g}% removed"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers that one seed's stages need; see `scaled_down_llm.Config`.

    Attributes:
      batch_size: sequences in a batch.
      steps: steps of training.
      retrain_steps: steps after pruning, and of the control.
      learning_rate: peak of training.
      retrain_learning_rate: peak of the steps after it.
      criteria: names of `CRITERIA`, each pruned by.
      retrain_criteria: those retrained after it.
      allocations: names of the task's allocations.
      retrain_allocations: those retrained.
      sparsities: the sweep.
      retrain_sparsities: those retrained at.
      eval_tokens: validation tokens of every loss; None for all.
      show_sparsity: where samples and single weights are shown.
      sample_length: characters of a sample.
      checkpoint_every: steps between checkpoints.
      energy_country: three-letter code, or None for no energy.
    """

    batch_size: int
    steps: int
    retrain_steps: int
    learning_rate: float
    retrain_learning_rate: float
    criteria: tuple[str, ...]
    retrain_criteria: tuple[str, ...]
    allocations: tuple[str, ...]
    retrain_allocations: tuple[str, ...]
    sparsities: tuple[float, ...]
    retrain_sparsities: tuple[float, ...]
    eval_tokens: int | None
    show_sparsity: float
    sample_length: int
    checkpoint_every: int
    energy_country: str | None

    @classmethod
    def of(cls, config: Any, *, solvers: bool = False, **specifics: Any) -> "Plan":
        """The plan of a configuration, checked.

        Sparsities are sorted; where a `retrain_` flag is left out, all that is pruned
        is retrained, but of the allocations the first one only.

        Args:
          config: configuration with the flags of every sweep, by the names of `Plan`.
          solvers: whether the task can be pruned by solvers too.
          **specifics: fields of the plan that an experiment fixes in its own way.

        Raises:
          ValueError: a criterion is unknown, or a number is out of range.
        """
        check(config, solvers=solvers)
        sparsities = tuple(sorted({*config.sparsities}))
        fields = {
            "criteria": config.criteria,
            "retrain_criteria": config.retrain_criteria,
            "allocations": config.allocations,
            "retrain_allocations": getattr(config, "retrain_allocations", None),
            "sparsities": sparsities,
            "retrain_sparsities": config.retrain_sparsities,
            # The tested sparsity that is nearest to the one asked for.
            "show_sparsity": min(
                sparsities, key=lambda share: abs(share - config.show_sparsity)
            ),
            "retrain_steps": config.retrain_steps,
            "checkpoint_every": config.checkpoint_every,
            "energy_country": config.energy,
            **specifics,
        }
        defaults = {
            "retrain_criteria": config.criteria,
            # Retraining every allocation would multiply the cost of a run.
            "retrain_allocations": config.allocations[:1],
            "retrain_sparsities": sparsities,
        }
        for name, default in defaults.items():
            if fields[name] is None:
                fields[name] = default
        return cls(**fields)

    def cells(self) -> list[Cell]:
        """Every way to prune, in order; a solver has its own allocation, so one."""
        # The sparsity is innermost, so the scores of a criterion are made once.
        ways = itertools.product(self.criteria, self.allocations, self.sparsities)
        return [
            cell
            for cell in (Cell(*way) for way in ways)
            if cell.allocation == self.allocations[0] or not named(cell.criterion)
        ]

    def stages(self) -> int:
        """How many stages a seed has: cells, retrained ones, and the dense model's."""
        cells = self.cells()
        retrained = sum(map(self.retrains, cells))
        dense = 3 + (self.retrain_steps > 0)  # train, measure, sample; control
        return len(cells) + retrained + dense

    def retrains(self, cell: Cell) -> bool:
        """Whether a cell is retrained too."""
        return (
            self.retrain_steps > 0
            and cell.criterion in self.retrain_criteria
            and cell.allocation in self.retrain_allocations
            and cell.sparsity in self.retrain_sparsities
        )

    def shows(self, cell: Cell) -> bool:
        """Whether a cell's samples are shown."""
        return (
            cell.sparsity == self.show_sparsity
            and cell.allocation == self.allocations[0]
        )


def check(config: Any, *, solvers: bool = False) -> None:
    """Refuses what could only fail later.

    Args:
      config: configuration with the options that every sweep has.
      solvers: whether solvers can be named among the criteria.

    Raises:
      ValueError: a criterion is unknown, a number out of range, or a list has doubles.
    """
    criteria = {*config.criteria, *(config.retrain_criteria or ())}
    unknown = [name for name in criteria - {*CRITERIA} if not (solvers and named(name))]
    if unknown:
        pairs = f", or {'|'.join(SOLVERS)}_ALLOCATION" if solvers else ""
        raise ValueError(
            f"criteria must be of {', '.join(CRITERIA)}{pairs}, got "
            f"{', '.join(unknown)}"
        )
    for name in ("seeds", "criteria", "allocations", "sparsities"):
        values = getattr(config, name)
        if not values or len({*values}) != len(values):
            raise ValueError(f"{name} must be named once each, got {values}")
        more = getattr(config, f"retrain_{name}", None) or ()
        if not {*more} <= {*values}:
            raise ValueError(f"retrain_{name} must be of {name}, got {more}")
    for share in config.sparsities:
        if not 0 < share < 1:
            raise ValueError(
                f"sparsities must be in (0, 1), got {share}; the dense model is always "
                "measured"
            )
    # A gradual sparsity rises between a twentieth and three fifths of these steps.
    fewest = 10 if GRADUAL in config.criteria and config.retrain_steps else 0
    if not config.retrain_steps >= fewest:
        raise ValueError(
            f"retrain_steps must be at least {fewest}, got {config.retrain_steps}"
        )
    counts = ("batch_size", "steps", "checkpoint_every")
    for name in (*counts, "learning_rate", "retrain_learning_rate"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be over 0, got {value}")
    if not min(config.seeds) >= 0:
        raise ValueError(f"seeds must be at least 0, got {config.seeds}")
