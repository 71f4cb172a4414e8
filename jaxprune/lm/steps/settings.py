"""The options of every step on a directory, and what they default to.

A step is a frozen dataclass of groups, and a group is a frozen dataclass of options.
The command shows each group under its title, and takes each option by its name alone.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import tyro

from jaxprune.lm.shrinking.units import Narrowing
from jaxprune.lm.steps.option_types import (
    UNSET,
    Count,
    Counts,
    Files,
    MaybeNumber,
    MaybePath,
    MaybeText,
    ModelPath,
    Names,
    Number,
    OutPath,
    Switch,
    choice_of,
)
from jaxprune.posttraining.passes import Chain
from jaxprune.posttraining.passes.efforts import Effort

SELF = Path("self")
"""In the place of a calibration text: what the model writes itself."""

CONTEXT, WINDOWS = 512, 16
"""Tokens of a window and windows of a text, wherever a perplexity is measured, so that
the same model has the same perplexity on the same text in all subcommands."""

YesNo: TypeAlias = Literal["yes", "no"]
Dtype: TypeAlias = Literal["float32", "bfloat16"]
MethodName: TypeAlias = Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"]
Integers: TypeAlias = Literal["int4", "int8"]
Trained: TypeAlias = Literal["all", "matrices", "norms", "lora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How the directory is read.

    Attributes:
      dtype: the dtype of parameters and products; as they are stored if left out.
      bos: whether each sequence of a text begins with the BOS token; as the directory
        says if left out.
      ignore_config: attributes of config.json to read as if they were not there; an
        unknown one that could change what the model computes is refused otherwise.
      mesh: devices to run on, "data=2,fsdp=4" say: each parameter is split over the
        devices of "fsdp" and repeated over those of "data"; `prune` takes a batch of
        calibration on each device. The first device alone if left out.
    """

    dtype: Annotated[Dtype | None, choice_of(Dtype), UNSET] = None
    bos: Annotated[YesNo | None, choice_of(YesNo), UNSET] = None
    ignore_config: Names = ()
    mesh: MaybeText = None


LoadingGroup: TypeAlias = Annotated[Loading, tyro.conf.arg(name="model")]
"""Beside the directory, which is called "model" too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The texts that show what the model is for.

    Attributes:
      calibration: texts that show what the model is for: .txt, .md; .jsonl or .parquet
        with a "text" in each line or row, or "messages", which the model's chat
        template writes; or .npy of int32 token ids (sequences, length). Several are a
        mixture with as many sequences of each. Give each kind of text that the model is
        for: that is worth more than the choice of a method. The word "self" stands for
        text that the model writes, beginning with tokens of the texts beside it; what
        was calibrated on texts alone loses most on texts of other kinds.
      sequences: number of sequences.
      length: tokens of a sequence, BOS included; the model's context where that is
        less.
      seed: decides which sequences are drawn and what is sampled.
      batch: number of sequences that the model sees at once.
      evaluate: texts to measure the perplexity on, before and after. If left out, the
        last tenth of each text, which then is not calibrated on.
    """

    calibration: Files = ()
    sequences: Count = 64
    length: Count = 512
    seed: Count = 0
    batch: Count = 4
    evaluate: Files = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The texts, without what the model writes itself."""
        return tuple(path for path in self.calibration if path != SELF)

    @property
    def self_sequences(self) -> int:
        """Number of sequences that the model writes itself; the last of the texts."""
        if SELF not in self.calibration:
            return 0
        # A mixture has as many sequences of each of its texts.
        return self.sequences // (1 + len(self.files))


AnyCalibration = TypeVar("AnyCalibration", bound=Calibration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A directory that is made of another one.

    Attributes:
      model: the directory of the model: config.json, *.safetensors, tokenizer.json.
      out: the directory to write, of the same form, with jaxprune.json and report.html.
      plan: say what would be done, and write nothing.
      overwrite: replace an earlier result.
    """

    model: ModelPath
    out: OutPath
    plan: Switch = False
    overwrite: Switch = False
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)

    @property
    def work(self) -> Path:
        """Where a run that is not done keeps what it has."""
        out = self.out.resolve()
        return out.with_name(f".{out.name}.work")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which weights are removed.

    Attributes:
      effort: in place of --method and its options, the best that is known for its time:
        quick is sparsegpt; good is alps, in two to three times as long; best lets the
        model write a part of the calibration too. Then `jaxprune recover`.
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
      quantize: put the weights that stay on integers of 4 or 8 bits, with a scale for
        each output and --group inputs: `jaxprune compact` then stores as few bits of
        each. sparsegpt and alps make up for the difference. The directory holds them
        as before, in the model's dtype.
      group: inputs that share a scale with --quantize, a multiple of 16.
      distributed: one of several processes that do this together, as the launcher says
        (Slurm, Open MPI, Kubernetes, Cloud TPU).
      passes: in Python, passes in place of all that says how weights are pruned.
    """

    effort: Annotated[Effort | None, choice_of(Effort), UNSET] = None
    method: Annotated[MethodName | None, choice_of(MethodName), UNSET] = None
    sparsity: MaybeNumber = None
    pattern: MaybeText = None
    allocation: Literal["layer", "global", "erk", "owl"] = "layer"
    exclude: Names = ()
    quantize: Annotated[Integers | None, choice_of(Integers), UNSET] = None
    group: Count = 128  # the usual one of GPTQ and AWQ
    distributed: Switch = False
    passes: Annotated[Chain | None, tyro.conf.Suppress] = None

    @property
    def bits(self) -> int | None:
        """Number of bits of a weight, or None."""
        return {None: None, "int4": 4, "int8": 8}[self.quantize]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneJob(Job):
    """A pruning.

    Without --calibration all methods but magnitude look at what the model writes
    itself, as with --calibration self.
    """

    pruning: Pruning = dataclasses.field(default_factory=Pruning)

    @property
    def streams(self) -> bool:
        """Whether the model is pruned tensor by tensor, without its code."""
        return self.pruning.method == "magnitude" and not self.calibration.calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """What is removed.

    Attributes:
      ffn: the share of the neurons of each MLP to remove.
      multiple: the neurons that are left are the nearest multiple of this; 64 or 128
        suits the kernels of GPUs and TPUs.
      heads: the share of the heads to remove: of key heads, each with all query heads
        that share it; where all share one key head, of query heads. transformers takes
        Llama and Gemma only with query heads that divide the width.
      experts: the share of the experts of each layer to remove: those that the router,
        on --calibration, gives the least weight to and that answer the least (REAP).
      layers: how many layers to leave: those go whose absence changes least what the
        model predicts on --calibration. Several numbers are the layers that stay.
      budget: in place of all others, the share of the parameters that may be left;
        neurons and heads then lose one share.
    """

    ffn: Number = 0.0
    multiple: Count = 1
    heads: Number = 0.0
    experts: Number = 0.0
    layers: Counts = ()
    budget: MaybeNumber = None

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked for, by option; JSON-able."""
        names = ("ffn", "heads", "experts", "layers", "budget")
        asked = {n: v for n in names if (v := getattr(self, n))}
        if asked and self.multiple > 1:
            asked["multiple"] = self.multiple
        return asked

    @property
    def layer_count(self) -> int | None:
        """Number of layers that stay of those that are searched, or None."""
        return self.layers[0] if len(self.layers) == 1 else None

    @property
    def narrowing(self) -> Narrowing:
        """The heads and neurons that go."""
        return Narrowing(
            ffn=self.ffn,
            heads=self.heads,
            multiple=self.multiple,
            budget=self.budget,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkCalibration(Calibration):
    """The texts by which units are chosen."""

    sequences: Count = 32  # a search of layers reads them many times
    length: Count = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkJob(Job):
    """A model with fewer layers, experts, heads and neurons."""

    removal: Removal = dataclasses.field(default_factory=Removal)
    calibration: ShrinkCalibration = dataclasses.field(
        default_factory=ShrinkCalibration
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimJob(Job):
    """A model with fewer tokens.

    Attributes:
      tokens: how many tokens stay, a multiple of 64.
    """

    tokens: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Training that makes up for what was removed; zeros stay zeros.

    Where embedding and head are not trained, a step computes the logits of the tokens
    that its sequences and their kept predictions name, and of a sample that stands for
    all others.

    Attributes:
      steps: steps of AdamW.
      teacher: the model to follow, with the same tokens: the one before it was pruned,
        or a larger one (KL divergence of the next-token distributions). It runs once,
        and its predictions lie on disk. If left out, the texts themselves are learned.
      train: what is trained: all parameters, the matrices of the layers, norms and
        biases, or those matrices by changes of rank 16 (lora). If left out, all with a
        teacher, the matrices without.
      learning_rate: the highest learning rate, reached in a twentieth of the steps; it
        then falls to zero. If left out, 0.002 times the root mean square of what is
        trained, for each tensor, experts of a layer together; 3e-5 for lora.
      text_share: how much of the loss is learning the texts, from 0 to 1, beside
        following the teacher; what the teacher wrote itself is followed alone.
    """

    steps: Count = 256
    teacher: MaybePath = None
    train: Annotated[Trained | None, choice_of(Trained), UNSET] = None
    learning_rate: MaybeNumber = None
    text_share: Number = 0.0

    @property
    def trained(self) -> Trained:
        """Which parameters are trained."""
        return self.train or ("matrices" if self.teacher is None else "all")

    @property
    def relative(self) -> bool:
        """Whether a leaf's learning rate is a multiple of its root mean square."""
        # A factor of a matrix's change begins at zero.
        return self.learning_rate is None and self.trained != "lora"

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (2e-3 if self.relative else 3e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingTexts(Calibration):
    """The texts that are trained on, in place of a calibration.

    A text that is too short gives the sequences that it has; all come in a new order
    once each was trained on.
    """

    sequences: Count = 256
    batch: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverJob(Job):
    """A pruned or smaller model that is trained on."""

    training: Training = dataclasses.field(default_factory=Training)
    calibration: TrainingTexts = dataclasses.field(default_factory=TrainingTexts)
