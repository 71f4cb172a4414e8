"""`jaxprune prune` of a loaded model: measured, pruned, retrained, written."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import lazy, processes
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.cli import (
    inputs,
    models,
    parse,
    progress_dir,
    provenance,
    recovery,
    sample,
)
from jaxprune.lm.cli.console import Console, byte_progress
from jaxprune.lm.cli.eval import measure, number
from jaxprune.lm.cli.inputs import Ready
from jaxprune.lm.cli.prune_options import Job, Meaning
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.texts.self_calibration import self_calibration

_PROMPT, _TEMPERATURE = 16, 0.8
_NAMES = ("weights", "leaves")  # of a refined block


def prune(
    job: Job, meaning: Meaning, console: Console, arguments: list[str]
) -> dict[str, Any]:
    """Prunes a model after a look at calibration texts; the record."""
    run = processes.together(lambda: begin(job, meaning, console))
    with contextlib.ExitStack() as place:
        held = progress_dir.held(job.work, _facts(run))
        processes.on_first(lambda: place.enter_context(held))
        return _prune(run, arguments)


def _prune(run: "Run", arguments: list[str]) -> dict[str, Any]:
    job, console = run.job, run.console
    with run.costs.phase("evaluate before"):
        dense = run.model.read()
        run.perplexity = inputs.dense(job, run.ready, dense, console)
        run.sample("dense", dense)
    if job.own_sequences:
        with run.costs.phase("write calibration"):
            run.ready = run.ready._replace(own=_written(run, dense))
    del dense
    with run.costs.phase("prune"):
        model, leaves, moved, record = _pruned(run)
    stage = "pruned"
    with run.costs.phase("evaluate after"):
        run.measure(stage, model)
    if job.recovery is not None and run.ready.recovery is not None:
        stage = job.recovery.stage
        with run.costs.phase(job.recovery.kind):
            model, trained, record[job.recovery.kind] = recovery.recover(
                job,
                job.recovery,
                run.ready.recovery,
                model,
                functools.partial(_dense, run, model, moved),
                leaves,
            )
            moved |= trained
        with run.costs.phase(f"evaluate {stage}"):
            run.measure(stage, model)
    run.sample(stage, model)
    record |= {
        "perplexity": run.perplexity,
        "samples": run.samples,
        "ignored_config": list(run.model.ignored),
        **provenance.making(arguments),
        "sizes": provenance.sizes(run.source, _counts(model, leaves), job.rounding),
        **run.costs.facts(),
    }
    _write(job, run.source, model, leaves, moved, record)
    return processes.on_first(lambda: rewrite.read_provenance(job.out))


def _facts(run: "Run") -> dict[str, Any]:
    """What decides the pruned weights, as far as it is known without reading any."""
    job, ready = run.job, run.ready
    return {
        **progress_dir.facts(job, run.source, ready.calibration, ready.begins.why),
        "method": f"{job.method}: {parse.settings(run.meaning.method)}",
        "pattern": parse.pattern_word(run.meaning.pattern),
        "sparsity": job.sparsity,
        "allocation": job.allocation,
        "excluded": list(job.exclude),
        "self": [job.own_sequences, job.calibration_temperature],
        "refine": job.refinement and parse.settings(job.refinement),
        "rounding": job.rounding and parse.settings(job.rounding),
    }


@dataclasses.dataclass
class Run:
    """A pruning under way.

    Attributes:
      model: the dense model, its parameters in their files.
      mesh: of the devices, or None.
      prompt: the tokens before a sample, or None where none is made.
      perplexity: what was measured, by text and stage.
      samples: "label" and "text" of each.
    """

    job: Job
    meaning: Meaning
    console: Console
    source: CheckpointDir
    ready: Ready
    model: models.Model
    mesh: jax.sharding.Mesh | None
    prunable: Any
    prompt: list[int] | None
    costs: Costs
    perplexity: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def measure(self, stage: str, model: models.Model) -> None:
        """Measures the model at a stage."""
        after = measure(model, self.ready.seen, self.job.batch)
        inputs.add(self.perplexity, stage, after)
        for name, result in after.items():
            shown = number(result["perplexity"])
            self.console.note(f"{stage}: perplexity {shown} on {name}")

    def sample(self, stage: str, model: models.Model) -> None:
        """Lets the model write at a stage."""
        if self.prompt is None or self.ready.tokenizer is None:
            return
        steps, seed = self.job.prompt_steps, self.job.seed
        tokens = sample.continued(model, self.prompt, steps, _TEMPERATURE, None, seed)
        text = sample.shown(self.ready.tokenizer, self.prompt, tokens)
        self.samples.append({"label": stage, "text": text})


def begin(job: Job, meaning: Meaning, console: Console) -> Run:
    """Reads the texts and the model's headers, and refuses what does not fit."""
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        parse.check_globs(job.exclude, source.tensors)
        ready = inputs.prepare(job, source)
        if ready.tokenizer is None and (source.path / "tokenizer.json").is_file():
            ready = ready._replace(tokenizer=hf.load_tokenizer(job.model))
        model = models.find(job.model, job)
        prunable = parse.by_name(lambda leaf: model.names[leaf].names, job.exclude)
        _check_pattern(meaning, model, prunable)
        progress_dir.check_room(job, source, 3 if job.refine else 2)
    models.say_ignored(model, console)
    prompt = _prompt(job, ready, model.config.context)
    mesh = models.device_mesh(job)
    return Run(
        job, meaning, console, source, ready, model, mesh, prunable, prompt, costs
    )


def _written(run: Run, dense: models.Model) -> np.ndarray:
    """What the dense model writes to be calibrated on."""
    job, tokenizer, size = run.job, run.ready.tokenizer, run.ready.vocab_size
    special = set() if tokenizer is None else tokenizer.special
    if tokenizer is not None:  # behind its tokens a model may have rows for none
        special |= set(range(tokenizer.vocab_size, size))
    with Progress(job.own_sequences, "writing", unit="sequence", leave=False) as shown:
        return self_calibration(
            dense.decoder(),
            sequences=job.own_sequences,
            length=job.length,
            seed=job.seed,
            temperature=job.calibration_temperature,
            bos=run.ready.begins.token,
            special=special,
            batch=job.batch,
            directory=job.work / "self",
            progress=shown.update,
        )


def _pruned(run: Run) -> tuple[models.Model, set[str], set[str], dict[str, Any]]:
    """The pruned model, its pruned leaves, all that moved, and what the record says."""
    job, model = run.job, run.model
    run.console.note(f"what is done is kept in '{job.work}' until the end")
    result = jp.prune_trained(
        functools.partial(_states, model.graphdef),
        model.params,
        _embedded(job, model, run.ready),
        method=_passes(run),
        sparsity=job.sparsity,
        pattern=run.meaning.pattern,
        allocation=run.meaning.allocation,
        prunable=run.prunable,
        directory=job.work,
        mesh=run.mesh,
        progress=processes.is_first(),
    )
    leaves = {row["name"] for row in result.report["weights"]}
    moved = leaves.union(*(row["leaves"] for row in result.report["refined"]))
    found = recovery.rounded(model._replace(params=result.params).read(), moved)
    return found, leaves, moved, _record(run, result.report)


def _passes(run: Run) -> jp.passes.Chain:
    """The method, and what the job does to a layer besides."""
    job = run.job
    steps: list[jp.passes.Pass] = [run.meaning.method]
    if job.refinement is not None:
        steps.append(job.refinement)
    if job.bits is not None:
        levels: Any = f"int{job.bits}"
        steps.append(jp.passes.quantize(levels, group=job.group))
    return jp.passes.chain(*steps)


def _states(graphdef: Any, params: Any, x: jax.Array) -> jax.Array:
    """The final states: all that is pruned is before them."""
    return nnx.merge(graphdef, params).states(x)[0]


def _embedded(job: Job, model: models.Model, ready: Ready) -> Iterator[jax.Array]:
    """The batches, embedded; the table of embeddings stays in its file."""
    tokens = ready.sequences
    for part in np.split(tokens, len(tokens) // job.batch):
        yield hf.embedded(job.model, model.names, model.config, part, job.dtype)


def _check_pattern(meaning: Meaning, model: models.Model, prunable: Any) -> None:
    """Refuses matrices that the pattern does not fit, by the directory's names."""
    problems: dict[str, list[str]] = {}
    for name, leaf in jp.tree.named_leaves(model.params).items():
        if not prunable(name, leaf):
            continue
        if problem := meaning.pattern.problem(leaf.shape, Axes()):
            problems.setdefault(problem, []).append(model.names[name].name)
    if problems:
        places = (f"{problem} at {listed(of)}" for problem, of in problems.items())
        raise ValueError(f"{'; '.join(places)}; leave such tensors out with --exclude")


def _prompt(job: Job, ready: Ready, context: int) -> list[int] | None:
    """The tokens before a sample, or None where none is made."""
    if job.prompt is not None and ready.tokenizer is None:
        raise ValueError(
            f"--prompt needs a tokenizer, but '{job.model}' has no tokenizer.json; "
            "leave --prompt out"
        )
    if not job.prompt_steps or ready.tokenizer is None:
        return None
    room = context - job.prompt_steps
    # Token ids are used as they are, and a prompt in words begins as a text does.
    token = models.beginning(ready.tokenizer, job, ready.vocab_size).token
    if job.prompt is None and not ready.seen:
        prompt = [] if token is None else [token]
    elif job.prompt is None:
        first = next(iter(ready.seen.values()))
        prompt = [int(token) for token in first.tokens[0, : max(1, min(_PROMPT, room))]]
    else:
        prompt = sample.start(ready.tokenizer, job.prompt, token)
    if not prompt:
        return None
    if len(prompt) > room:
        raise ValueError(
            f"a sample must fit the model's context of {context} tokens, got a prompt "
            f"of {len(prompt)} and --prompt-steps {job.prompt_steps}; take fewer steps"
        )
    return prompt


def _dense(run: Run, model: models.Model, leaves: set[str]) -> Decoder:
    """The model before; what has not moved is shared with the pruned one."""
    own = jp.tree.named_leaves(model.params)
    before = jp.tree.named_leaves(run.model.params)
    params = [
        lazy.array(before[name]) if name in leaves else leaf
        for name, leaf in own.items()
    ]
    structure = jax.tree.structure(model.params)
    return nnx.merge(model.graphdef, jax.tree.unflatten(structure, params))


def _record(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """What jaxprune.json says besides what was measured."""
    job, names = run.job, run.model.names
    return {
        "method": job.method,
        "settings": parse.settings(run.meaning.method),
        "pattern": parse.pattern_word(run.meaning.pattern),
        "sparsity": run.meaning.sparsity,
        "allocation": job.allocation,
        "rounding": job.rounding and dataclasses.asdict(job.rounding),
        "excluded": list(job.exclude),
        "dtype": run.model.config.dtype,
        "calibration": {
            **inputs.calibration(job, run.ready),
            "positions": report["positions"],
        },
        "unseen": report["unseen"],
        "weights": [
            {**row, "name": names[row["name"]].name, "leaf": row["name"]}
            for row in report["weights"]
        ],
        "refine": job.refine
        and {
            "passes": job.refine,
            "learning_rate": job.refine_learning_rate,
            "blocks": [
                {**row, **{k: [names[x].name for x in row[k]] for k in _NAMES}}
                for row in report["refined"]
            ],
        },
    }


def _counts(model: models.Model, leaves: set[str]) -> dict[str, tuple[int, int]]:
    """Tensor name to zeros and size, of the pruned ones."""
    named = jp.tree.named_leaves(model.params)
    parts = {
        theirs: named[name][i] if model.names[name].experts else named[name]
        for name in leaves
        for i, theirs in enumerate(model.names[name].names)
    }
    return jp.sparsity(parts).by_leaf


def _write(
    job: Job,
    source: CheckpointDir,
    model: models.Model,
    leaves: set[str],
    moved: set[str],
    record: dict[str, Any],
) -> None:
    """Writes the leaves that moved; the zeros of those that were pruned count."""
    named = jp.tree.named_leaves(model.params)

    def stored(leaf: str, i: int) -> Any:
        return model.names[leaf].stored(processes.fetch(named[leaf]), i)

    replaced: dict[str, Any] = {}
    for name in sorted(moved):
        origin = model.names[name]
        for i, theirs in enumerate((*origin.names, *origin.copies)):
            replaced[theirs] = functools.partial(stored, name, i)
    if not processes.is_first():  # hands over its parts, in the order of writing
        for name in rewrite.order(source, replaced):
            replaced[name]()
        return
    pruned = {theirs for name in leaves for theirs in model.names[name].names}
    with byte_progress(source.size, "writing") as progress:
        rewrite.write_directory(
            source,
            job.out,
            replaced,
            uncounted=replaced.keys() - pruned,
            provenance=record,
            overwrite=job.overwrite,
            progress=progress,
            finish=lambda _, record: ({}, provenance.with_page(record)),
        )
