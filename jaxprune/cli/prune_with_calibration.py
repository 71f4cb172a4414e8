"""`jaxprune prune` of a loaded model: measured, pruned, retrained, written."""

import functools
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.arrays.axes import Axes
from jaxprune.cli import models, parse, provenance, prune_inputs, sample
from jaxprune.cli.console import Console
from jaxprune.cli.costs import Costs
from jaxprune.cli.eval import measure, number
from jaxprune.cli.prune_inputs import Ready
from jaxprune.cli.prune_options import Job, Meaning
from jaxprune.evaluation import retrain
from jaxprune.formats import rewrite
from jaxprune.formats.checkpoint_dir import Directory, open_directory
from jaxprune.models import hf

_PROMPT, _TEMPERATURE = 16, 0.8


def prune(
    job: Job, meaning: Meaning, console: Console, arguments: list[str]
) -> dict[str, Any]:
    """Prunes a model after a look at calibration texts.

    Args:
      job: what is done.
      meaning: of its words.
      console: hears of it.
      arguments: of the command.

    Returns:
      The record.

    Raises:
      ValueError: something does not fit.
      OSError: a file could not be read or written.
    """
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        parse.check_globs(job.exclude, source.tensors)
        ready = prune_inputs.prepare(job, source)
        model = models.found(job.model, job)
        rule = parse.by_name(lambda leaf: model.names[leaf].name, job.exclude)
        _check_pattern(meaning, model, rule)
    prompt = _prompt(job, ready, model.config.context)
    with costs.phase("evaluate before"):
        dense = model.read()
        found = prune_inputs.dense(job, ready, dense, console)
        samples = _sampled([], "dense", job, ready, dense, prompt)
        del dense
    with costs.phase("prune"):
        console.note(f"what is done is kept in '{job.work}' until the end")
        trained = jp.prune_trained(
            functools.partial(_states, model.graphdef),
            model.params,
            _embedded(job, model, _drawn(ready)),
            method=meaning.method,
            sparsity=job.sparsity,
            pattern=meaning.pattern,
            allocation=parse.SHARES[job.shares],
            prunable=rule,
            directory=job.work,
        )
        leaves = {row["name"] for row in trained.report["weights"]}
        model = _rounded(model._replace(params=trained.params).read(), leaves)
        report = trained.report
    stage = "pruned"
    with costs.phase("evaluate after"):
        _measured(found, stage, job, ready, model, console)
    told: dict[str, Any] = {}
    if ready.retraining is not None:
        stage = "retrained"
        with costs.phase("retrain"):
            model, told["retraining"] = _retrained(
                job, ready.retraining, model, leaves, console
            )
        with costs.phase("evaluate retrained"):
            _measured(found, stage, job, ready, model, console)
    samples = _sampled(samples, stage, job, ready, model, prompt)
    told |= _told(job, meaning, ready, model, report, arguments)
    told |= {"perplexity": found, "samples": samples}
    counts = _counts(model, leaves)
    told |= {"sizes": provenance.sizes(source, counts), **costs.facts()}
    _write(job, source, model, leaves, told, console)
    whole = provenance.complete(job.out, {})
    shutil.rmtree(job.work, ignore_errors=True)
    return whole


def _states(graphdef: Any, params: Any, x: jax.Array) -> jax.Array:
    """The final states: all that is pruned is before them."""
    return nnx.merge(graphdef, params).states(x)[0]


def _embedded(job: Job, model: models.Model, tokens: np.ndarray) -> Iterator[jax.Array]:
    """The batches, embedded; the table of embeddings stays in its file."""
    for part in np.split(tokens, len(tokens) // job.batch):
        yield hf.embedded(job.model, model.names, model.config, part, job.dtype)


def _drawn(ready: Ready) -> np.ndarray:
    if ready.drawn is None:
        raise ValueError("--calibration must be given to look at the inputs")
    return ready.drawn.tokens


def _check_pattern(meaning: Meaning, model: models.Model, rule: Any) -> None:
    """Refuses matrices that the pattern does not fit, by the directory's names."""
    problems = [
        f"{problem} at '{model.names[name].name}'"
        for name, leaf in jp.tree.named_leaves(model.params).items()
        if rule(name, leaf) and (problem := meaning.pattern.problem(leaf.shape, Axes()))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems[:6])}; leave such tensors out with --exclude"
        )


def _prompt(job: Job, ready: Ready, context: int) -> list[int] | None:
    """The tokens before a sample, or None where none is made."""
    if not job.prompt_steps or ready.tokenizer is None:
        return None
    room = context - job.prompt_steps
    if job.prompt is None:
        first = next(iter(ready.seen.values()))
        prompt = [int(token) for token in first.tokens[0, : max(1, min(_PROMPT, room))]]
    else:
        prompt = sample.start(ready.tokenizer, job.prompt, ready.begins.token)
    if len(prompt) > room:
        raise ValueError(
            f"a sample must fit the model's context of {context} tokens, got a prompt "
            f"of {len(prompt)} and --prompt-steps {job.prompt_steps}; take fewer steps"
        )
    return prompt


def _sampled(
    samples: list[dict[str, str]],
    stage: str,
    job: Job,
    ready: Ready,
    model: models.Model,
    prompt: list[int] | None,
) -> list[dict[str, str]]:
    """The samples and one more."""
    if prompt is None or ready.tokenizer is None:
        return samples
    tokens = sample.continued(
        model, prompt, job.prompt_steps, _TEMPERATURE, None, job.seed
    )
    text = sample.shown(ready.tokenizer, [*prompt, *tokens])
    return [*samples, {"label": stage, "text": text}]


def _rounded(model: models.Model, leaves: set[str]) -> models.Model:
    """The model as it will be written: the pruned leaves as their tensors hold them."""

    def leaf(name: str, value: jax.Array) -> jax.Array:
        stored = model.names[name].dtype
        if name not in leaves or stored == value.dtype:
            return value
        return value.astype(stored).astype(value.dtype)

    named = jp.tree.named_leaves(model.params)
    values = [leaf(name, value) for name, value in named.items()]
    structure = jax.tree.structure(model.params)
    return model._replace(params=jax.tree.unflatten(structure, values))


def _measured(
    found: dict[str, dict[str, Any]],
    stage: str,
    job: Job,
    ready: Ready,
    model: models.Model,
    console: Console,
) -> None:
    after = measure(model, ready.seen, job.batch, console)
    prune_inputs.add(found, stage, after)
    for name, result in after.items():
        console.note(f"{stage}: perplexity {number(result['perplexity'])} on {name}")


def _retrained(
    job: Job,
    sequences: np.ndarray,
    model: models.Model,
    leaves: set[str],
    console: Console,
) -> tuple[models.Model, dict[str, Any]]:
    with console.bar("retraining", job.retrain_steps, "steps") as bar:

        def tick(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        params, losses = retrain.retrain(
            model.graphdef,
            model.params,
            leaves,
            sequences,
            batch=job.batch,
            steps=job.retrain_steps,
            learning_rate=job.retrain_learning_rate,
            seed=job.seed,
            tick=tick,
        )
    told = {
        "steps": job.retrain_steps,
        "learning_rate": job.retrain_learning_rate,
        "batch": job.batch,
        "texts": [path.name for path in job.retrain_text],
        "losses": losses,
    }
    return _rounded(model._replace(params=params), leaves), told


def _told(
    job: Job,
    meaning: Meaning,
    ready: Ready,
    model: models.Model,
    report: dict[str, Any],
    arguments: list[str],
) -> dict[str, Any]:
    """What jaxprune.json says besides what was measured."""
    rows = [
        {**row, "name": model.names[row["name"]].name, "leaf": row["name"]}
        for row in report["weights"]
    ]
    counts = ready.drawn.counts if ready.drawn is not None else []
    return {
        "method": job.method,
        "settings": repr(meaning.method),
        "pattern": str(meaning.pattern),
        "sparsity": meaning.sparsity,
        "shares": job.shares,
        "excluded": list(job.exclude),
        "dtype": model.config.dtype,
        "calibration": provenance.calibration(
            ready.calibration,
            counts,
            length=job.length,
            seed=job.seed,
            begins=ready.begins.why,
        )
        | {"positions": report["positions"]},
        "unseen": report["unseen"],
        "weights": rows,
        **provenance.making(arguments),
    }


def _counts(model: models.Model, leaves: set[str]) -> dict[str, tuple[int, int]]:
    """Tensor name to zeros and size, of the pruned ones."""
    named = jp.tree.named_leaves(model.params)
    zeros = jp.sparsity({name: named[name] for name in leaves}).by_leaf
    return {model.names[name].name: count for name, count in zeros.items()}


def _write(
    job: Job,
    source: Directory,
    model: models.Model,
    leaves: set[str],
    told: dict[str, Any],
    console: Console,
) -> None:
    named = jp.tree.named_leaves(model.params)
    replaced = {
        model.names[name].name: functools.partial(
            _stored, named[name], model.names[name]
        )
        for name in sorted(leaves)
    }
    total = sum(info.size for info in source.tensors.values())
    with console.bar("writing", total, "B") as bar:
        rewrite.write(
            source,
            job.out,
            replaced,
            provenance=told,
            overwrite=job.overwrite,
            progress=lambda what, done, total: bar.update(done - bar.n),
        )


def _stored(leaf: jax.Array, source: hf.Source) -> np.ndarray:
    array = np.asarray(leaf)
    return array.T if source.transposed else array
