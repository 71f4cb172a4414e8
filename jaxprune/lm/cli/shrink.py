"""`jaxprune shrink`: a smaller model, as a directory that every loader reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.messages import columns, listed
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.cli import (
    defaults,
    inputs,
    models,
    plan,
    progress_dir,
    provenance,
    recovery,
    shrink_options,
    shrink_search,
    shrink_units,
)
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.eval import by_stage, measure, number
from jaxprune.lm.measure import speed
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.models import hf
from jaxprune.structured.budget import OutOfReach

_PROMPT, _STEPS = 256, 32  # tokens, of what is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(shrink_options.Job):
    """Removes whole layers, experts, heads and neurons; leaves a smaller model.

    All layers lose as many heads and neurons, since config.json has one number for all;
    which ones differs by layer. Without --calibration the sizes of the weights decide.
    With it, the neurons and heads whose absence costs least are removed, layer after
    layer, and the weights that stay are updated. The same command resumes a run that
    was killed; --plan says what would be done.
    """

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Shrinks the model; the record."""
        progress_dir.refuse_done(self, arguments)
        shrink_options.check(self)
        return defaults.lengths(self)._run(console, arguments)

    def _run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        costs = Costs()
        with costs.phase("read"):
            source = open_directory(self.model)
            model = models.find(self.model, self)
            shrink_options.check_fits(self, source, model.config)
            ready = inputs.prepare(self, source)
            progress_dir.check_room(self, source, 1)
        models.say_ignored(model, console)
        _say_narrowed(self, source, console)
        if self.plan:
            return plan.shrink(self, source, model, ready, console)
        facts = progress_dir.facts(self, source, ready.calibration, ready.begins.why)
        with progress_dir.held(self.work, {**facts, "asked": self.asked}):
            small, record = _shrunk(self, ready, model.read(), console, costs)
            record |= provenance.making(arguments)
            # By the names of all layers.
            _write(self, source, small._replace(names=model.names), record, costs)
        record = rewrite.read_provenance(self.out)
        console.say(_summary(record))
        console.say(f"'{self.out}': the model, jaxprune.json, report.html")
        if source.uncopied:
            console.note(f"not copied: {', '.join(source.uncopied)}")
        return {**record, "out": str(self.out)}


def _say_narrowed(job: Shrink, source: CheckpointDir, console: Console) -> None:
    """Names weights that are written with fewer bits than they were stored with."""
    digits = jnp.finfo(job.dtype or np.float32).nmant
    narrowed = [
        name
        for name, info in source.tensors.items()
        if jnp.issubdtype(info.dtype, jnp.floating)
        and jnp.finfo(info.dtype).nmant > digits
    ]
    if narrowed:
        console.note(
            f"all weights are written as they are read, in {job.dtype or 'float32'}: "
            f"{listed(narrowed)} lose bits"
        )


def _shrunk(
    job: Shrink,
    ready: inputs.Ready,
    whole: models.Model,
    console: Console,
    costs: Costs,
) -> tuple[models.Model, dict[str, Any]]:
    """The smaller model, trained on if that was asked for, and its record."""
    with costs.phase("evaluate before"):
        measured = inputs.dense(job, ready, whole, console)

    def note(stage: str, model: models.Model) -> None:
        now = measure(model, ready.seen, job.batch)
        inputs.add(measured, stage, now)
        for name, result in now.items():
            shown = number(result["perplexity"])
            console.note(f"{stage}: perplexity {shown} on {name}")

    record: dict[str, Any] = {
        "pattern": "whole layers, experts, heads and neurons",
        "sparsity": job.asked,
        "ignored_config": list(whole.ignored),
        "perplexity": measured,
    }
    tokens = None
    if ready.drawn is not None:
        tokens = ready.drawn.tokens
        record["calibration"] = inputs.calibration(job, ready)
    with costs.phase("shrink"):
        small, removed = _without(job, whole, tokens, console)
    record |= removed
    record["method"] = "shrink by " + ", ".join(_ways(job, "units" in record))
    # Measured is what will be written.
    small = recovery.rounded(small, set(jp.tree.names(small.params)))
    with costs.phase("evaluate after"):
        note("shrunk", small)
    if job.recovery is not None and ready.recovery is not None:
        named = jp.tree.named_leaves(small.params)
        matrices = {
            name for name, leaf in named.items() if jp.tree.prunable(name, leaf)
        }
        with costs.phase(job.recovery.kind):
            small, _, record[job.recovery.kind] = recovery.recover(
                job,
                job.recovery,
                ready.recovery,
                small,
                whole.decoder,
                matrices,
            )
        with costs.phase(f"evaluate {job.recovery.stage}"):
            note(job.recovery.stage, small)
    sizes = {"before": _size(whole), "after": _size(small)}
    record["sizes"] = sizes
    counts = [sizes[when]["parameters"] for when in ("before", "after")]
    record["achieved"] = 1 - counts[1] / counts[0]
    if job.speed_rounds:
        with costs.phase("time"):
            record["speed"] = _timed(job, whole, small)
    return small, record


def _without(
    job: Shrink, whole: models.Model, tokens: np.ndarray | None, console: Console
) -> tuple[models.Model, dict[str, Any]]:
    """The model without what was asked to go, and what that was."""
    record: dict[str, Any] = {}
    layers, budget, heads = job.layers, job.budget, 1.0
    if job.search and tokens is not None:
        found = shrink_search.divide(job, whole, tokens, console)
        record["search"] = found.tried
        layers, budget, heads = found.layers, found.budget, found.heads
    small, record["layers"] = shrink_units.without_layers(
        job, whole, tokens, layers, console
    )
    if job.experts and tokens is not None:
        small, record["experts"] = shrink_units.without_experts(job, small, tokens)
    if budget is not None and not job.search:
        budget = shrink_units.rest_of_budget(job, budget, whole, small)
    if job.narrows and budget != 1:
        small, record["units"] = _narrower(job, small, tokens, budget, heads)
    return small, record


def _narrower(
    job: Shrink,
    small: models.Model,
    tokens: np.ndarray | None,
    budget: float | None,
    heads: float,
) -> tuple[models.Model, dict[str, Any]]:
    """As `shrink_units.narrower`; a budget out of reach is told as it was asked for."""
    try:
        return shrink_units.narrower(job, small, tokens, budget, heads)
    except OutOfReach as error:
        if job.search or budget == job.budget:
            raise
        raise OutOfReach(
            f"--budget {job.budget:g} of the whole is out of reach without what else "
            f"goes: of what is left {error}"
        ) from None


def _ways(job: Shrink, narrowed: bool) -> list[str]:
    """How what goes is chosen, in a word each."""
    said = {
        "a search": job.search,
        "the loss without each layer": job.layers is not None,
        "the layers named": bool(job.drop_layers),
        "reap": bool(job.experts),
        "obs" if job.calibration else "magnitude": narrowed,
    }
    return [way for way, given in said.items() if given]


def _size(model: models.Model) -> dict[str, int]:
    """Parameters, bytes as they are stored, and the shape."""
    named = jp.tree.named_leaves(model.params)
    stored = {name: model.names[name].dtype.itemsize for name in named}
    config = model.config
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "bytes": sum(leaf.size * stored[name] for name, leaf in named.items()),
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "mlp_width": config.mlp_width,
        "experts": config.experts,
    }


def _timed(job: Shrink, whole: models.Model, small: models.Model) -> dict[str, Any]:
    """Tokens per second of both, in turn."""
    steps = min(_STEPS, whole.config.context // 2)
    prompt = min(_PROMPT, whole.config.context - steps)
    both = {"before": whole.decoder(), "after": small.decoder()}
    rounds = job.speed_rounds
    with Progress(2 * rounds, "timing", unit="run", leave=False) as progress:
        found = speed.measure_speed(
            both, prompt=prompt, steps=steps, rounds=rounds, progress=progress.update
        )
    facts = {"prompt": prompt, "steps": steps, "batch": 1, "rounds": rounds}
    return {**facts, "dtype": whole.config.dtype, **found}


def _write(
    job: Shrink,
    source: CheckpointDir,
    small: models.Model,
    record: dict[str, Any],
    costs: Costs,
) -> None:
    def finish(_: Any, written: Any) -> Any:
        from jaxprune.lm.report import shrunk_model

        page = shrunk_model.document(written)
        return {}, {provenance.PAGE: page.encode(errors="replace")}

    hf.write_smaller(
        source.path,
        job.out,
        small.params,
        small.names,
        kept=record["layers"]["kept"],
        ignore_config=job.ignore_config,
        provenance={**record, **costs.facts()},
        overwrite=job.overwrite,
        finish=finish,
    )


def _summary(record: dict[str, Any]) -> str:
    """The results for people."""
    lines = []
    if record["perplexity"]:
        lines.append(by_stage(record))
    if timed := record.get("speed"):
        rows = [
            [kind, *(f"{timed[when][kind]:,.1f}" for when in ("before", "after"))]
            for kind in ("prefill", "decode")
        ]
        header = ["tokens per second", "before", "after"]
        lines.append(columns([header, *rows], right=True))
    before, after = (record["sizes"][when] for when in ("before", "after"))
    lines.append(
        f"{after['parameters']:,} of {before['parameters']:,} parameters, "
        f"{after['layers']} of {before['layers']} layers; {record['seconds']:.1f} s"
    )
    return "\n".join(lines)
