"""Train a small Phi-3-vision, track its weights, prune it or a part, retrain, report.

    python -m experiments.phi3_vision --out results/vision

The paper's second experiment at a size for an afternoon: pictures with questions that
only the picture answers. Started again with the same flags, a run continues where it
was; a finished one says so. What it writes is described in experiments/README.md.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from experiments.harness import device_mesh, runner
from experiments.harness.option_rules import at_least
from experiments.harness.plan import Plan
from experiments.phi3_vision import checkpoint, presets, question_answers
from experiments.phi3_vision.task import PictureTask, without_gradient
from experiments.phi3_vision.vision_model import Tokenizer, VisionModel
from experiments.tasks import model_directory
from jaxprune.arrays import rules
from jaxprune.arrays.low_bit import Storage
from jaxprune.arrays.rules import Rule
from jaxprune.files import atomic

Part = Literal["all", "decoder", "tower"]
FROZEN = {
    "decoder": ("decoder/*",),
    "tower": ("tower/*",),
    "projector": ("project_in/*", "project_out/*", "separator", "row_end"),
}
"""What may be left as it is, by the globs of its leaves."""
_RULES = (
    at_least("held_out", 1),
    rules.within(
        *("lora", 1, math.inf), "lora must be a rank of at least 1, got {lora}"
    ),
    Rule(
        lambda v: not (v.partly_trained and v.preconditioned_adam),
        "preconditioned_adam needs Adam's moments of every weight, but with --frozen "
        "or --lora there are none of some",
        "take preconditioned_magnitude",
    ),
    Rule(
        lambda v: not (v.lora and v.gradually),
        "gradual prunes by Adam's moments of the weights, but with --lora there are "
        "none; leave it out, or --retrain-steps 0",
    ),
    Rule(
        lambda v: not {*v.frozen} & {*v.allocations},
        "what is frozen is not pruned: leave {frozen_parts} out of --allocations",
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small Phi-3-vision with tracking, prunes it, retrains it.

    Attributes:
      out: directory of the results; a run found there continues.
      preset: size of the model that is trained from nothing.
      model: a directory of Phi-3-vision to fine-tune in its place.
      data: "picture_questions", made of what scikit-learn ships; "tfds:NAME"; or a
        directory with train.jsonl and validation.jsonl.
      fields: the features of tfds:NAME that are picture, question and answer.
      held_out: at most so many questions are measured on.
      crops: at most so many crops of a picture; the model's if left out.
      frozen: what is not trained, nor pruned: "tower", "decoder", "projector".
      lora: rank of each matrix's change, everything else frozen; if left out all that
        is not frozen is trained.
      storage: what averages are held in, 4, 2 or 1 bytes a weight.
      checkpointing: whether activations inside a layer are made again for the gradient,
        for less memory.
      dtype: type of the matrix products; parameters are float32.
      data_dir: where data sets are kept; TFDS's default if left out.
      seeds: one training run each.
      criteria: what to prune by; see experiments/harness/criteria.py.
      retrain_criteria: those retrained too; all of `criteria` if left out.
      allocations: what is ranked together and pruned, "all", the "decoder" or the
        "tower".
      retrain_allocations: those retrained; the first of `allocations` if left out.
      sparsities: fractions of the allocation's matrices to remove.
      retrain_sparsities: those retrained at; if left out 0.25, 0.5 and 0.8, or all of
        `sparsities` where those are others.
      batch_size: pictures in a batch.
      steps: steps of training.
      retrain_steps: steps after pruning, and of the dense control; 0 for neither.
      learning_rate: peak.
      retrain_learning_rate: peak of the steps after pruning; a tenth of that of
        training if left out.
      show_sparsity: where answers, layers and single weights are shown.
      checkpoint_every: steps between checkpoints.
      energy: three-letter code of the country whose electricity counts, to measure
        energy and CO2 (needs the extra `energy`).
      mesh: how the devices share the work, "data=8" or "fsdp=8".
      smoke: everything at a size that ends within a minute.
    """

    out: Path = Path("results/phi3_vision")
    preset: Literal["cpu"] = "cpu"
    model: Path | None = None
    data: str = question_answers.OWN
    fields: tuple[str, ...] = ()
    held_out: int = 1000
    crops: int | None = None
    frozen: tuple[Literal["tower", "decoder", "projector"], ...] = ()
    lora: int | None = None
    storage: Storage = "float32"
    checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0,)
    criteria: tuple[str, ...] = (
        "preconditioned_magnitude",
        "averaged_weight",
        "magnitude",
    )
    retrain_criteria: tuple[str, ...] | None = None
    allocations: tuple[Part, ...] = ("all", "decoder", "tower")
    retrain_allocations: tuple[Part, ...] | None = None
    sparsities: tuple[float, ...] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    retrain_sparsities: tuple[float, ...] | None = None
    batch_size: int = 32
    steps: int = 6000
    retrain_steps: int = 100
    learning_rate: float = 5e-4
    retrain_learning_rate: float | None = None
    show_sparsity: float = 0.5
    checkpoint_every: int = 250
    energy: str | None = None
    mesh: str | None = None
    smoke: bool = False

    def smaller(self) -> "Config":
        """The same at the size of `--smoke`."""
        return dataclasses.replace(
            self,
            seeds=self.seeds[:1],
            criteria=self.criteria[:2],
            retrain_criteria=None,
            retrain_allocations=None,
            sparsities=(0.25, 0.8),
            retrain_sparsities=(0.8,),
            batch_size=8,
            steps=30,
            retrain_steps=10,
        )

    def plan(self) -> Plan:
        """The numbers of one seed, checked.

        Raises:
          ValueError: a criterion is unknown, or a number is out of range.
        """
        config = self.smaller() if self.smoke else self
        config.check()
        rate, retrained = config.learning_rate, config.retrain_sparsities
        if retrained is None:
            # Retraining costs far more than pruning, so of the eight sparsities three
            # are retrained.
            defaults = {*config.sparsities} & {0.25, 0.5, 0.8}
            retrained = tuple(sorted(defaults)) or None
        return Plan.of(
            config,
            batch_size=config.batch_size,
            steps=config.steps,
            learning_rate=rate,
            # A tenth of the peak: where the cosine of training ends.
            retrain_learning_rate=config.retrain_learning_rate or rate / 10,
            retrain_sparsities=retrained,
            # All questions are measured on; an answer has a few tokens, and there is no
            # sample text.
            eval_tokens=None,
            sample_length=1,
        )

    def check(self) -> None:
        """Refuses what could only fail later.

        Raises:
          ValueError: a number is out of range, or what is frozen is to be pruned.
        """
        rules.check(
            _RULES,
            partly_trained=bool(self.frozen or self.lora),
            preconditioned_adam="preconditioned_adam" in self.criteria,
            gradually="gradual" in self.criteria and self.retrain_steps > 0,
            frozen_parts=", ".join(self.frozen),
            **vars(self),
        )


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
      FloatingPointError: a loss is not finite.
    """
    plan = config.plan()
    if config.model is not None:
        atomic.apart(config.out, config.model)
    mesh = device_mesh.make_mesh(config.mesh, plan.batch_size)
    task = make_task(config, mesh)
    identity = runner.identity_of(
        config,
        plan,
        preset=config.preset if config.model is None else None,
        model=None if config.model is None else str(config.model),
        weights=config.model and model_directory.fingerprint(config.model),
        data=config.data,
        frozen=config.frozen,
        lora=config.lora,
        storage=config.storage,
        crops=task.model.config.crops,
        fingerprint=question_answers.fingerprint((*task.train, *task.held_out)),
    )
    if mesh is not None:
        device_mesh.shardings(task.shapes, mesh)

    def more(seeds: list[dict[str, Any]]) -> dict[str, Any]:
        model = runner.described(task, task.allocations["all"][1])
        model["without_gradient"] = without_gradient(task)
        return {"model": model, "text_only": task.text_only()}

    return runner.sweep("phi3_vision", config, plan, task, identity, mesh, more)


def make_task(config: Config, mesh: Mesh | None = None) -> PictureTask:
    """The model and its pictures; a model of a directory is read onto the mesh.

    Raises:
      ValueError: the pictures or the model's directory are not what they must be.
      OSError: something is missing, or cannot be read.
    """
    splits = question_answers.load(
        config.data, data_dir=config.data_dir, fields=config.fields
    )
    held_out = splits["validation"][: 64 if config.smoke else config.held_out]
    if config.model is None:
        name = "smoke" if config.smoke else config.preset
        shape = checkpoint.vision_config(presets.PRESETS[name])
        # The pictures are 28 x 56: two crops of the tower's 28 x 28 beside the global
        # view.
        crops, model = 2, None
        tokenizer = presets.tokenizer()
        if config.data != question_answers.OWN:
            raise ValueError(
                f"--data {config.data} needs --model DIR; the preset knows the words "
                f"of {question_answers.OWN} alone"
            )
    else:
        model = model_directory.opened(config.model, mesh, checkpoint.load)
        shape, crops = model.config, model.config.crops
        tokenizer = Tokenizer.of(model.tokenizer)
    shape = dataclasses.replace(shape, crops=config.crops or crops)
    return PictureTask(
        VisionModel(
            shape.with_dtype(config.dtype),
            start=model and model.read,
            remat=config.checkpointing,
        ),
        tokenizer,
        splits["train"],
        held_out,
        # Globs of leaves, for a part's name is a flag's word and no prefix of its
        # leaves.
        frozen=tuple(glob for part in config.frozen for glob in FROZEN[part]),
        rank=config.lora,
        storage=config.storage,
        write=model and model.write,
    )
