"""The settings of `jaxprune prune`, group by group."""

import dataclasses
from typing import Annotated, Literal, TypeAlias

from jaxprune.lm.jobs.option_types import (
    UNSET,
    Count,
    MaybeNumber,
    MaybeText,
    Names,
    Switch,
    choice_of,
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
from jaxprune.posttraining.passes.efforts import Effort

MethodName: TypeAlias = Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"]
"""The methods by the names that the command gives them."""

Integers: TypeAlias = Literal["int4", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which weights are removed.

    Attributes:
      effort: in place of --method and its options, the best that is known for its time:
        quick is sparsegpt; good is alps, in two to three times as long; best lets the
        model write a part of the calibration and trains what is left for 256 steps, and
        takes longest. It trains nothing with --quantize, without a text, beyond a
        billion parameters, through torch, and in several processes.
      method: magnitude looks at the weights alone; wanda and ria at the inputs' sizes
        too; sparsegpt and alps also update the weights that stay, alps better and more
        slowly. magnitude without --calibration goes through any safetensors directory
        in the memory of one tensor. If left out, sparsegpt for the families
        that `inspect` names, and for others with a calibration, through torch; else
        magnitude.
      sparsity: the share to remove, in [0, 1). Leave it out with --pattern n:m.
      pattern: "unstructured" ranks the weights of a matrix together, "per-output" those
        of each output; "2:4" keeps 2 of each 4 along the input; "16x16" removes blocks.
        If left out, per-output for wanda and unstructured for the others.
      allocation: how the sparsity is shared out: layer (to each matrix the same),
        global (one ranking of all magnitudes), erk (by its shape), owl (layers with
        outliers keep more). Shares by name are for Python.
      exclude: names of tensors to leave alone, also as globs: "*.down_proj.weight".
    """

    effort: Annotated[Effort | None, choice_of(Effort), UNSET] = None
    method: Annotated[MethodName | None, choice_of(MethodName), UNSET] = None
    sparsity: MaybeNumber = None
    pattern: MaybeText = None
    allocation: Literal["layer", "global", "erk", "owl"] = "layer"
    exclude: Names = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Few bits for the weights that stay.

    Attributes:
      quantize: quantize the weights that stay to integers of 4 or 8 bits, with a scale
        for each output and --group inputs: `jaxprune compact` then stores so few bits
        of each. sparsegpt and alps make up for the difference. The directory holds them
        as before, in the model's dtype.
      group: inputs that share a scale with --quantize, a multiple of 16.
    """

    quantize: Annotated[Integers | None, choice_of(Integers), UNSET] = None
    group: Count = 128  # the usual one of GPTQ and AWQ

    @property
    def bits(self) -> int | None:
        """Number of bits of a weight, or None."""
        return {None: None, "int4": 4, "int8": 8}[self.quantize]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneDevices(Devices):
    """What the model runs on.

    Attributes:
      distributed: one of several processes that do this together, as the launcher says
        (Slurm, Open MPI, Kubernetes, Cloud TPU).
    """

    distributed: Switch = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneJob(Job):
    """A pruning.

    Without --calibration all methods but magnitude look at what the model writes
    itself, as with --calibration self.
    """

    pruning: Pruning = dataclasses.field(default_factory=Pruning)
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    recovery: Recovery = dataclasses.field(default_factory=Recovery)
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)
    devices: PruneDevices = dataclasses.field(default_factory=PruneDevices)

    @property
    def streams(self) -> bool:
        """Whether the model is pruned tensor by tensor, without its code."""
        return self.pruning.method == "magnitude" and not self.calibration.calibration

    @property
    def runs_model(self) -> bool:
        """Whether the model is run where it is pruned tensor by tensor."""
        return bool(self.evaluation.evaluate)
