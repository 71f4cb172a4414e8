"""The steps of `jaxprune.lm` in Python: each takes a model and gives a model.

A step that was killed goes on where it was when it is called again with the same
`out`, and one that is done is not done again.
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxprune.lm.model import Model, PathLike, Texts, console_of
from jaxprune.lm.steps import provenance
from jaxprune.lm.steps.settings import (
    Job,
    PruneJob,
    Pruning,
    RecoverJob,
    Removal,
    ShrinkJob,
    Trained,
    Training,
    TrimJob,
)
from jaxprune.lm.steps.skeleton import run_job
from jaxprune.lm.torch_models import choosing
from jaxprune.posttraining.passes import Pass
from jaxprune.posttraining.passes.chaining import as_chain
from jaxprune.posttraining.passes.efforts import Effort


def prune(
    model: Model,
    texts: Texts | None = None,
    *,
    sparsity: float | None = None,
    effort: Effort | None = None,
    passes: Pass | str | None = None,
    exclude: Collection[str] = (),
    out: PathLike | None = None,
) -> Model:
    """A model with zeros, of the same shapes.

    Args:
      model: model that is pruned.
      texts: texts that show what it is for; what the model writes itself if left out.
      sparsity: share of the weights to remove, in [0, 1); None where the pattern of
        `passes` fixes it.
      effort: "quick", "good" or "best", in place of `passes`.
      passes: a method's name, a pass of `jp.passes` or a chain of them.
      exclude: globs on the names of tensors to leave alone.
      out: directory to write; a scratch directory if left out.

    Returns:
      The pruned model; its `record` says what was done and measured.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    chain = None if passes is None else as_chain(passes)
    pruning = Pruning(effort=effort, sparsity=sparsity, exclude=tuple(exclude))
    if chain is not None:
        pruned = chain.pruning
        share: Any = pruned.sparsity if sparsity is None else sparsity
        method: Any = type(pruned).__name__.lower()
        pruning = dataclasses.replace(
            pruning, passes=chain, sparsity=share, method=method
        )
    return _step(PruneJob, model, texts, out, pruning=pruning)


def shrink(
    model: Model,
    texts: Texts | None = None,
    *,
    ffn: float = 0.0,
    multiple: int = 1,
    heads: float = 0.0,
    experts: float = 0.0,
    layers: int | Sequence[int] = (),
    budget: float | None = None,
    out: PathLike | None = None,
) -> Model:
    """A smaller model: fewer layers, experts, heads and neurons.

    Args:
      model: model that is made smaller.
      texts: texts that show what it is for; without, the weights alone decide.
      ffn: share of the neurons of each MLP to remove.
      multiple: number that the neurons of a layer are a multiple of afterwards.
      heads: share of the key heads to remove, each with all query heads of it.
      experts: share of the experts of each layer to remove.
      layers: number of layers that stay, or the numbers of those that do.
      budget: share of the parameters that may be left, in place of all others.
      out: directory to write; a scratch directory if left out.

    Returns:
      The smaller model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    kept = (layers,) if isinstance(layers, int) else tuple(layers)
    removal = Removal(
        ffn=ffn,
        multiple=multiple,
        heads=heads,
        experts=experts,
        layers=kept,
        budget=budget,
    )
    return _step(ShrinkJob, model, texts, out, removal=removal)


def trim(
    model: Model, texts: Texts, *, tokens: int, out: PathLike | None = None
) -> Model:
    """A model with fewer tokens: a smaller embedding, head and tokenizer.

    Args:
      model: model whose vocabulary is made smaller.
      texts: texts whose tokens stay.
      tokens: number of tokens that stay, a multiple of 64.
      out: directory to write; a scratch directory if left out.

    Returns:
      The smaller model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    return _step(TrimJob, model, texts, out, tokens=tokens)


def recover(
    model: Model,
    texts: Texts,
    *,
    teacher: Model | None = None,
    steps: int = Training.steps,
    train: Trained | None = None,
    learning_rate: float | None = None,
    text_share: float = 0.0,
    out: PathLike | None = None,
) -> Model:
    """A pruned or smaller model, trained on; its zeros stay zeros.

    Args:
      model: model that is trained.
      texts: texts that are trained on; "self" is written by the teacher.
      teacher: model whose predictions are followed; the texts themselves are learned if
        left out.
      steps: steps of AdamW.
      train: "all", "matrices", "norms" or "lora": what is trained.
      learning_rate: highest learning rate; for each tensor by its size if left out.
      text_share: share of the loss that is learning the texts, beside a teacher.
      out: directory to write; a scratch directory if left out.

    Returns:
      The trained model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    training = Training(
        steps=steps,
        teacher=None if teacher is None else teacher.path,
        train=train,
        learning_rate=learning_rate,
        text_share=text_share,
    )
    return _step(RecoverJob, model, texts, out, training=training)


def _step(
    job_class: Any,
    model: Model,
    texts: Texts | None,
    out: PathLike | None,
    **groups: Any,
) -> Model:
    """Does a step, or finds that the same one is done."""
    place = None
    if out is None:
        place = _Scratch()
        out = place.path / "model"
    calibration: Any = job_class.__dataclass_fields__["calibration"].default_factory()
    if texts is not None:
        calibration = dataclasses.replace(
            calibration, calibration=texts.files, **texts.options
        )
    job: Job = job_class(
        model=model.path,
        out=Path(out),
        calibration=calibration,
        loading=model.loading,
        **groups,
    )
    command = f"jaxprune.lm, {job}"
    if not provenance.is_done(job.out, command):
        with console_of(model) as console:
            run_job(choosing.prepare_step, job, console, command)
    return dataclasses.replace(model, path=job.out, _place=place)


class _Scratch:
    """A directory that goes with its last model."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="jaxprune-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
