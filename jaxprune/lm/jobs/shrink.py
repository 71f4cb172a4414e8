"""`jaxprune shrink`: a smaller model, as a directory that every loader reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.jobs import (
    budget_reach,
    defaults,
    inputs,
    progress_dir,
    provenance,
    smaller_vocabulary,
)
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.model_transformation import ModelTransformation
from jaxprune.lm.jobs.opening import (
    model_context,
    note_ignored,
    open_for_job,
    read_dense,
)
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.recovery import as_stored
from jaxprune.lm.jobs.shrink_plan import plan_shrink
from jaxprune.lm.jobs.shrink_rules import check_fits, check_shrink
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.jobs.teacher import open_teacher
from jaxprune.lm.jobs.transformation import Change, Prepared
from jaxprune.lm.measure import speed
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import possible_sizes, units
from jaxprune.lm.vocabulary.new_vocabulary import NewVocabulary

_PROMPT, _STEPS = 256, 32  # tokens, of what is timed


def prepare_shrink(job: ShrinkJob, console: Console) -> Prepared:
    """Reads what a shrinking needs, and refuses what does not fit.

    Args:
      job: what was asked for.
      console: where the job speaks.

    Returns:
      The shrinking, with its plan.

    Raises:
      ValueError: something does not fit.
    """
    check_shrink(job)
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        context = model_context(source, job.loading.ignore_config)
        job = dataclasses.replace(
            job,
            calibration=defaults.shorten_sequences(job.calibration, context),
            evaluation=defaults.shorten_windows(job.evaluation, context),
        )
        model = open_for_job(job.model, job.loading, job.devices)
        check_fits(job.removal, source, model.config)
        budget_reach.check_budget(job.removal, source, model)
        other_teacher = open_teacher(job, source, model)
        texts = inputs.read_texts(job, source)
        progress_dir.check_room(job, source, 1, texts.trained_tokens)
        smaller_vocabulary.check_vocabulary(job, source, texts)
    note_ignored(model, console)
    _note_narrowed(job.loading.dtype, source, console)
    shrinking = ModelShrinking(
        job=job,
        source=source,
        console=console,
        costs=costs,
        model=model,
        texts=texts,
        other_teacher=other_teacher,
    )
    return Prepared(
        functools.partial(plan_shrink, job, model, texts, console),
        shrinking.run,
    )


@dataclasses.dataclass(kw_only=True)
class ModelShrinking(ModelTransformation[ShrinkJob]):
    """A model that loses tokens, layers, experts, heads and neurons.

    Attributes:
      fewer: vocabulary that it gets, and the texts by its tokens, once the dense model
        was looked at; None where all stay.
    """

    NAME, STAGE = "shrink", "shrunk"

    fewer: tuple[NewVocabulary, JobTexts] | None = None

    def facts(self) -> dict[str, Any]:
        """What decides the smaller model, known without reading a weight."""
        facts = progress_dir.job_facts(self.job, self.source, self.texts)
        facts["correction"] = self.job.calibration.correction
        return {**facts, "asked": self.job.removal.asked}

    def look_at_dense(self) -> None:
        """Reads the dense model, measures it and lets it write a calibration."""
        # In memory to the end: it teaches, and is timed beside the small one.
        self.model = read_dense(self.model)
        super().look_at_dense()
        self.write_calibration(self.model)
        if self.job.removal.vocab is None:
            return
        with self.costs.phase("choose tokens"):
            self.fewer = smaller_vocabulary.choose_for_job(
                *(self.job, self.source, self.texts),
                *(self.model.decoder(), self.console),
            )
        if self.fewer is not None:  # the dense model was measured by its own tokens
            self.texts = self.measurements.texts = self.fewer[1]

    def with_tokens(self, model: LoadedModel) -> LoadedModel:
        """Another model with the tokens that the job leaves."""
        return model if self.fewer is None else model.with_tokens(self.fewer[0].kept)

    @functools.cached_property
    def reference(self) -> LoadedModel:
        """The model that loses more, and teaches: the dense one with its new tokens."""
        return self.with_tokens(self.model)

    def change(self) -> Change[LoadedModel]:
        """Removes what was asked for; the weights that stay are as they are stored."""
        tokens = self.texts.sequences if self.job.calibration.calibration else None
        small, record = self._without(tokens)
        if tokens is not None:
            calibration = self.job.calibration
            described = inputs.describe_calibration(calibration, self.texts)
            record["calibration"] = described
        if self.fewer is not None:
            record["vocabulary"] = self.fewer[0].facts
        record |= {
            "pattern": "whole tokens, layers, experts, heads and neurons",
            "sparsity": self.job.removal.asked,
            "ignored_config": list(self.model.ignored),
            "method": "shrink by " + ", ".join(_ways(self.job, record)),
        }
        # Measured is what will be written.
        small = as_stored(small, set(jp.tree.names(small.params)))
        named = jp.tree.named_leaves(small.params)
        matrices = {n for n, leaf in named.items() if jp.tree.prunable(n, leaf)}
        return Change(small, set(named), matrices, record)

    def before(self, change: Change[LoadedModel]) -> LoadedModel:
        """The dense model, which knows the tokens that stay."""
        return self.reference

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the sizes of both models, and how fast they are."""
        sizes = {"before": _sizes(self.model), "after": _sizes(change.model)}
        before, after = (sizes[when]["parameters"] for when in ("before", "after"))
        change.record.update(sizes=sizes, achieved=1 - after / before)
        if rounds := self.job.evaluation.speed_rounds:
            with self.costs.phase("time"):
                change.record["speed"] = _timed(self.model, change.model, rounds)

    def write(self, change: Change[LoadedModel], page: Page) -> None:
        """Writes all of the smaller model."""
        hf.write_smaller(
            self.source.path,
            self.job.out,
            change.model.params,
            self.model.names,  # of all layers
            kept=change.record["layers"]["kept"],
            settings={} if self.fewer is None else self.fewer[0].settings,
            ignore_config=self.job.loading.ignore_config,
            provenance=change.record,
            overwrite=self.job.overwrite,
            finish=lambda _, record: ({}, provenance.page_file(page, record)),
        )

    def _without(
        self, tokens: Int[np.ndarray, "sequences length"] | None
    ) -> tuple[LoadedModel, dict[str, Any]]:
        """The model without what was asked to go, and what that was."""
        removal, batch = self.job.removal, self.job.calibration.batch
        work, note = self.job.work, self.console.note
        layers, narrowing = removal.layers, removal.narrowing
        dense = self.reference
        record: dict[str, Any] = {}
        possible = possible_sizes.possible_head_units(self.source.config, dense.config)
        correction = self.job.calibration.correction
        narrowing = narrowing._replace(head_units=possible, correction=correction)
        # Tokens went first. Then go layers, then experts of those that stay, then their
        # heads and neurons.
        if layers is None or tokens is None:
            count = dense.config.layers
            kept = [i for i in range(count) if i not in removal.drop_layers]
            record["layers"] = {"kept": kept}
        else:
            record["layers"] = units.search_layers(
                dense, tokens, layers, batch=batch, work=work, note=note
            )._asdict()
        small = units.keep_layers(dense, record["layers"]["kept"])
        if removal.experts and tokens is not None:
            share = removal.experts
            small, record["experts"] = units.without_experts(
                small, tokens, share, batch=batch
            )
        # What is gone counts: the rest of the budget is a larger share of what stays.
        if narrowing.budget is not None:
            share = budget_reach.remaining_budget(removal, self.model, small)
            narrowing = narrowing._replace(budget=share)
        if narrowing.narrows and narrowing.budget != 1:
            with budget_reach.names_whole_budget(removal, narrowing.budget):
                small, record["units"] = units.narrow(
                    small, narrowing, tokens, batch=batch, work=work
                )
        return small, record


def _note_narrowed(dtype: str | None, source: CheckpointDir, console: Console) -> None:
    """Names weights that are written with fewer bits than they were stored with."""
    digits = jnp.finfo(dtype or np.float32).nmant  # bits of the fraction
    narrowed = [
        name
        for name, info in source.tensors.items()
        if jnp.issubdtype(info.dtype, jnp.floating)
        and jnp.finfo(info.dtype).nmant > digits
    ]
    if narrowed:
        console.note(
            f"all weights are written as they are read, in {dtype or 'float32'}: "
            f"{listed(narrowed)} lose bits"
        )


def _ways(job: ShrinkJob, record: dict[str, Any]) -> list[str]:
    """What chose what goes, in a word for each."""
    removal = job.removal
    ways = {
        "counted and expected tokens": removal.vocab is not None,
        "the loss without each layer": removal.layers is not None,
        "the layers named": bool(removal.drop_layers),
        "reap": bool(removal.experts),
        "obs" if job.calibration.calibration else "magnitude": "units" in record,
    }
    return [way for way, used in ways.items() if used]


def _sizes(model: LoadedModel) -> dict[str, float]:
    """Parameters, bytes as they are stored, and the shape."""
    named = jp.tree.named_leaves(model.params)
    stored = {name: model.names[name].dtype.itemsize for name in named}
    config = model.config
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "bytes": sum(leaf.size * stored[name] for name, leaf in named.items()),
        "tokens": config.vocab_size,
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "mlp_width": config.mlp_width,
        "experts": config.experts,
    }


def _timed(dense: LoadedModel, small: LoadedModel, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, in turn, and of the dense model once more."""
    context = dense.config.context
    steps = min(_STEPS, context // 2)  # as many fit a short context
    prompt = min(_PROMPT, context - steps)
    decoder = dense.decoder()
    models = {"before": decoder, "again": decoder, "after": small.decoder()}
    with Progress(len(models) * rounds, "timing", unit="run", leave=False) as progress:
        times = speed.measure_speed(
            models, prompt=prompt, steps=steps, rounds=rounds, progress=progress.update
        )
    facts = {"prompt": prompt, "steps": steps, "batch": 1, "rounds": rounds}
    ratios = speed.compare_speed(*(times[name] for name in models))
    return {**facts, "dtype": dense.config.dtype, **times, "ratios": ratios}
