"""The settings of `jaxprune shrink`, group by group."""

import dataclasses
from typing import Any

from jaxprune.lm.jobs.option_types import (
    Count,
    Counts,
    MaybeCount,
    MaybeNumber,
    Number,
)
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import (
    Calibration,
    Devices,
    Evaluation,
    Job,
    Loading,
    LoadingGroup,
)
from jaxprune.lm.shrinking.units import Narrowing
from jaxprune.structured.budget import Measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """What is removed.

    Attributes:
      vocab: how many tokens to leave, a multiple of 64: those that --calibration has
        most and that the model expects along it, and what any text needs. The texts
        then are split by the new tokenizer.
      ffn: the share of the neurons of each MLP to remove.
      multiple: the neurons that are left are the nearest multiple of this; 64 or 128
        suits the kernels of GPUs and TPUs.
      heads: the share of the heads to remove: of key heads, each with all query heads
        that share it; where all share one key head, of query heads. transformers takes
        Llama and Gemma only with query heads that divide the width.
      query_heads: the share of the query heads of each key head to remove.
      experts: the share of the experts of each layer to remove: those that the router,
        on --calibration, gives the least weight to and that answer the least (REAP).
      layers: how many layers to leave; those go whose absence changes least what the
        model predicts on --calibration.
      drop_layers: the numbers of the layers to remove, in place of --layers.
      budget: in place of --ffn and --heads, the share that may be left of the
        parameters, or of what --measure says; neurons and heads then lose one share.
      measure: what the budget is of. FLOPs are counted of reading a prompt, without
        the head.
    """

    vocab: MaybeCount = None
    ffn: Number = 0.0
    multiple: Count = 1
    heads: Number = 0.0
    query_heads: Number = 0.0
    experts: Number = 0.0
    layers: MaybeCount = None
    drop_layers: Counts = ()
    budget: MaybeNumber = None
    measure: Measure = "parameters"

    @property
    def asked(self) -> dict[str, Any]:
        """What is to go; JSON-able."""
        shares = ("ffn", "heads", "query_heads", "experts", "layers", "drop_layers")
        names = ("vocab", *shares, "budget")
        asked = {name: value for name in names if (value := getattr(self, name))}
        if asked and self.multiple > 1:
            asked["multiple"] = self.multiple
        if self.budget:
            asked["measure"] = self.measure
        return asked

    @property
    def narrowing(self) -> Narrowing:
        """How many heads and neurons go."""
        return Narrowing(
            ffn=self.ffn,
            heads=self.heads,
            query_heads=self.query_heads,
            multiple=self.multiple,
            budget=self.budget,
            measure=self.measure,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkCalibration(Calibration):
    """The texts that show what the model is for.

    Attributes:
      correction: how much of what the layers before it lost each layer makes up for, in
        [0, 1], where neurons and heads are chosen by --calibration; the dense model
        then runs beside the smaller one.
    """

    sequences: Count = 32  # a search of layers reads them many times
    length: Count = 256
    correction: Number = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkEvaluation(Evaluation):
    """What the model is measured by, before and after.

    Attributes:
      speed_rounds: how often both models are timed, in turn, the dense one twice; with
        less than 3 no difference counts, and 0 does not time them.
    """

    speed_rounds: Count = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkJob(Job):
    """A model that becomes smaller."""

    removal: Removal = dataclasses.field(default_factory=Removal)
    calibration: ShrinkCalibration = dataclasses.field(
        default_factory=ShrinkCalibration
    )
    evaluation: ShrinkEvaluation = dataclasses.field(default_factory=ShrinkEvaluation)
    recovery: Recovery = dataclasses.field(default_factory=Recovery)
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)
    devices: Devices = dataclasses.field(default_factory=Devices)
