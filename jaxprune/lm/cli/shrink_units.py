"""What `jaxprune shrink` removes: layers, experts, then heads and neurons of those."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.graph.axis_dims import root
from jaxprune.lm.cli import models
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.shrink_options import Job, head_units, multiples_of
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf.smaller import name_before
from jaxprune.lm.shrinking import layer_search
from jaxprune.lm.shrinking.expert_scores import expert_scores
from jaxprune.structured import shrink

_DOWN, _OUT = "mlp/down/kernel", "attention/out/kernel"
_SEARCHED = "layers.json"
_CHOSEN = "units.json"
_PROMPT = 256  # tokens, whose FLOPs or time a budget may be of


def without_layers(
    job: Job,
    model: models.Model,
    tokens: np.ndarray | None,
    layers: int | None,
    console: Console,
) -> tuple[models.Model, dict[str, Any]]:
    """The model with some of its layers, and which they are and how they were found."""
    whole = model.config.layers
    if layers is None or tokens is None:
        kept = [i for i in range(whole) if i not in job.drop_layers]
        found: dict[str, Any] = {"kept": kept}
    else:
        found = _searched(job, model, tokens, layers, console)._asdict()
    config, params = hf.keep_layers(model.config, model.params, found["kept"])
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    # A layer that moved up is still stored in its own dtypes.
    names = {
        name: model.names[name_before(name, found["kept"])]
        for name in jp.tree.names(params)
    }
    small = model._replace(graphdef=graphdef, params=params, config=config, names=names)
    return small, found


def _searched(
    job: Job, model: models.Model, tokens: np.ndarray, layers: int, console: Console
) -> layer_search.LayerSearch:
    """The layers that a search leaves; each that went is noted on disk."""
    place, whole = job.work / _SEARCHED, model.config.layers
    begun = layer_search.LayerSearch(**read_json(place)) if place.is_file() else None
    if begun and len(begun.kept) <= layers:  # a search of the budget went further
        gone = begun.dropped[: whole - layers]
        kept = [layer for layer in range(whole) if layer not in gone]
        return layer_search.LayerSearch(kept, gone, begun.nats[: len(gone)])
    past = begun.kept if begun else list(range(whole))
    passes = sum(range(layers + 1, len(past) + 1)) + 1  # the whole model
    batches = passes * -(-len(tokens) // job.batch)
    with Progress(batches, "searching layers", unit="batch", leave=False) as progress:
        found = layer_search.search_layers(
            model.graphdef,
            model.params,
            tokens,
            layers,
            batch=job.batch,
            start=begun,
            progress=progress.update,
            save=lambda left: atomic.replace_json(place, left._asdict()),
        )
    went = zip(found.dropped, found.nats, strict=True)
    console.note(
        "KL(dense || smaller) in nats a token, as layers went: "
        + (", ".join(f"{layer}: {nats:.4f}" for layer, nats in went) or "none did")
    )
    return found


def without_experts(
    job: Job, model: models.Model, tokens: np.ndarray
) -> tuple[models.Model, dict[str, Any]]:
    """The model with the experts of each layer that score highest, and the scores."""
    count = model.config.experts
    with Progress(len(tokens), "scoring experts", leave=False) as progress:
        scores, given = expert_scores(
            model.graphdef,
            model.params,
            tokens,
            batch=job.batch,
            progress=progress.update,
        )
    left = count - round(job.experts * count)
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :left]
    kept = np.sort(highest, axis=1).tolist()
    config, params = hf.keep_experts(model.config, model.params, kept)
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    found = {"kept": kept, "scores": scores.tolist(), "tokens": given.tolist()}
    return model._replace(graphdef=graphdef, params=params, config=config), found


def narrower(
    job: Job,
    model: models.Model,
    tokens: np.ndarray | None,
    budget: float | None,
    heads: float = 1.0,
) -> tuple[models.Model, dict[str, Any]]:
    """The model with fewer heads and neurons, and the report of what became fewer.

    Args:
      job: says the shares, where there is no budget.
      model: with all its parameters in memory.
      tokens: of the calibration, (sequences, length); None goes by the weights alone.
      budget: the share of this model that may be left.
      heads: of a budget, the share of the heads that goes beside that of the neurons.

    Returns:
      The smaller model; the report, as of `jp.shrink`, with "roles" of its groups.
    """
    fn, batch, groups = grouped(model)
    roles = _roles(groups, model)
    asked: dict[str, Any]
    if budget is not None:
        parts = {"ffn": 1.0, "heads": heads}
        own = {n: parts[role] for n, role in roles.items() if parts.get(role)}
        asked = {"budget": {job.measure: budget}, "groups": own}
    else:
        shares = {"ffn": job.ffn, "heads": job.heads, "query heads": job.query_heads}
        asked = {"sparsity": {name: shares[role] for name, role in roles.items()}}
    possible = {}
    if job.multiple > 1:
        possible["ffn"] = [*multiples_of(job, model.config.mlp_width)]
    if budget is not None:
        possible["heads"] = _heads(job, model)
    asked["sizes"] = {n: possible[r] for n, r in roles.items() if r in possible}
    # Times differ from run to run: one that goes on takes what was chosen by the first.
    place, timed = job.work / _CHOSEN, None
    if job.measure == "milliseconds" and place.is_file():
        timed = read_json(place)
        asked = {"sparsity": timed["shares"]}
    if tokens is None:
        scores = jp.scores.magnitude(model.params)
        found = jp.shrink(fn, model.params, batch, scores, **asked)
    else:
        batches = _alike(tokens, job.batch)
        asked |= {"batches": batches, "relative": True}
        found = jp.shrink(fn, model.params, batches[0], **asked)
    if timed is not None:
        found.report["milliseconds"] = timed["milliseconds"]
    elif job.measure == "milliseconds":
        sizes = found.report["groups"].items()
        shares = {name: 1 - own["after"] / own["before"] for name, own in sizes}
        times = found.report["milliseconds"]
        atomic.replace_json(place, {"shares": shares, "milliseconds": times})
    config = hf.resized(model.config, found.params)
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    small = model._replace(graphdef=graphdef, params=found.params, config=config)
    kinds = {name: roles[name] for name in found.report["kept"]}
    return small, {**found.report, "roles": kinds}


def rest_of_budget(
    job: Job, budget: float, whole: models.Model, model: models.Model
) -> float:
    """The share that may be left of a model which lost layers or experts before."""
    if model.config == whole.config:
        return budget
    costs = (shrink.whole_costs(grouped(own)[2]) for own in (whole, model))
    before, now = (getattr(own, job.measure) for own in costs)
    return float(min(budget * before / now, 1.0))


def _heads(job: Job, model: models.Model) -> list[int]:
    """The numbers of units of heads that a checkpoint can have, this one's too."""
    whole = head_units(model.config)
    each = model.config.heads // whole
    fit = hf.heads_that_fit(read_json(job.model / "config.json"), model.config)
    return [*(heads // each for heads in fit if heads % each == 0), whole]


def grouped(model: models.Model) -> tuple[Any, jax.ShapeDtypeStruct, jp.AxisGroups]:
    """The model as a function of parameters and tokens, a batch of it, its groups."""
    # What the head reads is enough to find the groups by, and to calibrate on.
    fn = functools.partial(_states, model.graphdef)
    shape = (1, min(_PROMPT, model.config.context))
    batch = jax.ShapeDtypeStruct(shape, np.int32)
    return fn, batch, jp.axis_groups(fn, model.params, batch)


def _alike(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Batches of one size, the largest that leaves no sequence over."""
    size = max(n for n in range(1, most + 1) if len(tokens) % n == 0)
    return np.split(tokens, len(tokens) // size)  # of (size, length)


def _states(graphdef: Any, params: Any, ids: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return model.states(model.embed(ids))[0]


def _roles(groups: jp.AxisGroups, model: models.Model) -> dict[str, str]:
    """Name of a group to what it is: "ffn", "heads", "query heads"."""
    names = {group.dim: group.name for group in groups}
    dims = {leaf.name: leaf.parts[0] for leaf in groups.trace.leaves}
    config, roles = model.config, {}
    for layer in range(config.layers):
        if not config.experts:
            roles[names[root(dims[f"layers/{layer}/{_DOWN}"][0])]] = "ffn"
        # Key heads x query heads of each x features; those of one are left out.
        whole = root(dims[f"layers/{layer}/{_OUT}"][0])
        parts = whole.parts or [whole]
        if config.heads > 1:
            roles[names[root(parts[0])]] = "heads"
        if 1 < config.kv_heads < config.heads:
            roles[names[root(parts[1])]] = "query heads"
    return roles
