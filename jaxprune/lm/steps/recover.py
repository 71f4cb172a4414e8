"""`jaxprune recover`: a pruned or smaller model, trained on; its zeros stay zeros."""

import dataclasses
import math
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.recovery import predictions, retrain
from jaxprune.lm.recovery.sampled_tokens import TokenSampler, sampler_of
from jaxprune.lm.steps import progress_dir, provenance, rules
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.family_step import FamilyStep, open_step
from jaxprune.lm.steps.opening import as_stored, open_for_job, read_dense
from jaxprune.lm.steps.prune_record import count_zeros, write_pruned
from jaxprune.lm.steps.settings import RecoverJob
from jaxprune.lm.steps.skeleton import Change, Prepared

_TOKENIZER = "tokenizer.json"
_RANK = 16  # of "lora"
TOP = 64
"""Likeliest tokens of a prediction that are kept on disk."""


def prepare_recover(job: RecoverJob, console: Console) -> Prepared:
    """Reads what a recovery needs, and refuses what does not fit.

    Args:
      job: options of the recovery.
      console: where it speaks.

    Returns:
      The recovery, ready to run.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    rules.check_options(job, rules.RECOVER)
    source = open_directory(job.model)
    record = _record_before(source)
    if record.get("rounding"):
        raise ValueError(
            f"the weights of '{job.model}' are on levels of int"
            f"{record['rounding']['bits']}, which training would move them off; "
            "recover first and quantize last"
        )
    fields = open_step(job, console, copies=1, more_bytes=_progress_bytes(job, source))
    teacher = _open_teacher(fields["job"], source, fields["model"])
    recovery = Recovery(**fields, teacher=teacher)
    return Prepared(recovery.plan, recovery.run)


def _record_before(source: CheckpointDir) -> dict[str, Any]:
    """What jaxprune.json says of the model; nothing where it has none."""
    if not (source.path / rewrite.NAME).is_file():
        return {}
    return rewrite.read_provenance(source.path)


@dataclasses.dataclass(kw_only=True)
class Recovery(FamilyStep[RecoverJob]):
    """A training on texts, or after a teacher.

    Attributes:
      teacher: model that is followed, still in its files, or None.
    """

    NAME, STAGES = "recover", ("before", "recovered")

    teacher: LoadedModel | None

    def facts(self) -> dict[str, Any]:
        """What decides the trained weights, known without reading one."""
        facts = {**super().facts(), "training": str(self.job.training)}
        if path := self.job.training.teacher:
            facts["teacher"] = progress_dir.file_times(open_directory(path))
        return facts

    def write_calibration(self, writer: LoadedModel) -> None:
        """Leaves it to the teacher, who writes in `change`."""

    def change(self) -> Change[LoadedModel]:
        """Keeps the teacher's predictions, lets it go, and trains."""
        loss, sampler, sequences = None, None, None
        model = self.model
        names = self._trained_leaves()
        if self.teacher is None:
            sequences = self.texts.sequences
            sampler = self._sampler(names, sequences)
            loss = retrain.from_text(sampler)
        else:
            kept, sequences, shares = self._keep_predictions(self.teacher)
            sampler = self._sampler(names, sequences, kept.likeliest)
            loss = predictions.from_predictions(kept, text=shares, sampler=sampler)
        model = read_dense(model)
        zeros = _sparse_leaves(model)
        training, calibration = self.job.training, self.job.calibration
        settings = retrain.Settings(
            steps=training.steps,
            learning_rate=training.rate,
            relative=training.relative,
            batch=calibration.batch,
            seed=calibration.seed,
            rank=_RANK if training.trained == "lora" else None,
        )
        with Progress(training.steps, "training", unit="step", leave=False) as progress:

            def tick(steps: int, loss: float) -> None:
                progress.note(f"loss {loss:.3f}")
                progress.update(steps)

            decoder, losses = retrain.retrain(
                model.decoder(),
                names,
                sequences,
                settings,
                loss=loss,
                masked=zeros,
                directory=self.job.work / "training",
                progress=tick,
            )
        trained = model._replace(params=nnx.state(decoder, nnx.Param))
        before = _record_before(self.source)
        record = {
            "method": "retraining" if self.teacher is None else "distillation",
            "calibration": self.texts.describe(calibration),
            "ignored_config": list(self.model.ignored),
            "training": {
                "steps": training.steps,
                "learning_rate": training.rate,
                "relative": training.relative,
                "batch": calibration.batch,
                "trained": training.trained,
                "teacher": training.teacher and str(training.teacher),
                "text_share": training.text_share,
                "logits": sampler.size if sampler else None,
                "losses": losses,
            },
            # The hashes of the earlier directory's files say nothing of this one.
            "before": {k: v for k, v in before.items() if k != "files"},
        }
        return Change(as_stored(trained, names), names, zeros, record)

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the zeros and sizes of the model."""
        counts = count_zeros(change.model, change.matrices)
        change.record["sizes"] = provenance.weight_sizes(self.source, counts)

    def write(self, change: Change[LoadedModel]) -> None:
        """Writes the leaves that were trained; the zeros of sparse ones count."""
        write_pruned(self.job, self.source, change)

    def plan(self) -> dict[str, Any]:
        """Says what would be trained, on what."""
        training, batch = self.job.training, self.job.calibration.batch
        how = "retrained" if training.teacher is None else f"after {training.teacher}"
        self.console.say(
            f"{how} in {training.steps} steps ({training.trained}, batch {batch})"
        )
        for line in self.texts.plan_lines(self.job.calibration):
            self.console.say(line)
        self.console.say("nothing was written")
        plan = {"steps": training.steps, "trained": training.trained, "batch": batch}
        return {"plan": plan}

    def _keep_predictions(
        self, teacher: LoadedModel
    ) -> tuple[
        predictions.Predictions,
        Int[np.ndarray, "sequences length"],
        Float[np.ndarray, " sequences"],
    ]:
        """The teacher's predictions, the sequences, each text's share of the loss."""
        dense = read_dense(teacher)
        super().write_calibration(dense)
        parts = self.texts.parts
        shares = [np.full(len(part), self.job.training.text_share) for part in parts]
        if self.texts.written is not None:
            # To learn what the model wrote itself would sharpen what it predicts.
            shares[-1][:] = 0
        sequences, text = np.concatenate(parts), np.concatenate(shares)
        shown = Progress(len(sequences), "predicting", unit="sequence", leave=False)
        with shown as progress:
            kept = predictions.keep_predictions(
                dense.decoder(),
                sequences,
                self.job.work / "predictions",
                top=TOP,
                batch=self.job.calibration.batch,
                followed=text < 1,
                progress=progress.update,
            )
        return kept, sequences, text

    def _sampler(
        self, names: Set[str], sequences: np.ndarray, likeliest: Any = None
    ) -> TokenSampler | None:
        """What draws the tokens of a step; None where tokens are trained, or few."""
        config = self.model.config
        fewer = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
        if names & hf.changed_axes(config, fewer).keys():
            return None
        return sampler_of(
            config.vocab_size,
            sequences,
            likeliest,
            batch=self.job.calibration.batch,
            seed=self.job.calibration.seed,
        )

    def _trained_leaves(self) -> set[str]:
        named = tree.named_leaves(self.model.params)
        match self.job.training.trained:
            case "all":
                return set(named)
            case "norms":
                # By name, since norms of heads and biases of experts have two axes.
                ends = ("scale", "bias")
                return {name for name in named if name.rsplit("/", 1)[-1] in ends}
        return {name for name, leaf in named.items() if leaves.prunable(name, leaf)}


def _sparse_leaves(model: LoadedModel) -> set[str]:
    """The matrices that have zeros, of this step or of an earlier one."""
    named = tree.named_leaves(model.params)
    return {
        n for n, leaf in named.items() if leaves.prunable(n, leaf) and (leaf == 0).any()
    }


def _progress_bytes(job: RecoverJob, source: CheckpointDir) -> int:
    """Bytes that the teacher's predictions and two checkpoints may take."""
    calibration, training = job.calibration, job.training
    # float32 and int32 of each token, and float32 of all others together.
    token_bytes = 0 if training.teacher is None else 8 * TOP + 4
    followed = calibration.sequences * calibration.length * token_bytes
    if training.trained == "norms":
        return followed
    # In float32 the weights; AdamW's moments are of small factors under "lora".
    weight_bytes = 4 if training.trained == "lora" else 12
    shapes = [info.shape for info in source.tensors.values()]
    if training.trained != "all":  # neither embedding nor head
        vocabulary = source.config.get("vocab_size")
        shapes = [s for s in shapes if len(s) > 1 and vocabulary not in s]
    return followed + 2 * weight_bytes * sum(map(math.prod, shapes))


def _open_teacher(
    job: RecoverJob, source: CheckpointDir, model: LoadedModel
) -> LoadedModel | None:
    """The model that is followed, still in its files; it must have the same tokens."""
    path = job.training.teacher
    if path is None:
        return None
    teacher = open_for_job(path, job.loading)
    files = [folder / _TOKENIZER for folder in (path, source.path)]
    if all(map(Path.is_file, files)):
        first, second = (_vocabulary(read_json(file)) for file in files)
        if first != second:
            raise ValueError(
                f"--teacher must have the model's tokens, but '{path}' has others; "
                "give a model of the same tokenizer"
            )
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"--teacher must have as many logits as the model, but '{path}' has "
            f"{teacher.config.vocab_size} and the model {model.config.vocab_size}; "
            "give a model of the same vocab_size"
        )
    if teacher.config.context < job.calibration.length:
        raise ValueError(
            f"--teacher must take sequences of --length {job.calibration.length}, but "
            f"the context of '{path}' is {teacher.config.context}; give shorter ones"
        )
    return teacher


def _vocabulary(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, dict):
        return None
    model = tokenizer.get("model")
    added = {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or ()}
    return model.get("vocab") if isinstance(model, dict) else None, added
