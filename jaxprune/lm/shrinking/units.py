"""Smaller models of a model: without layers, without experts, with fewer heads.

What takes long is noted in a directory of progress, where a run that was stopped finds
it.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.graph.axis_dims import root
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.smaller_tensors import name_before
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import layer_search
from jaxprune.lm.shrinking.expert_scores import expert_scores
from jaxprune.lm.shrinking.possible_sizes import multiples

_DOWN, _OUT = "mlp/down/kernel", "attention/out/kernel"
_SEARCHED = "layers.json"
_SOLVED = "units"
_PROMPT = 256  # tokens, whose FLOPs a budget may be of


class Narrowing(NamedTuple):
    """How many heads and neurons go.

    Attributes:
      ffn: share of the neurons to remove, where there is no budget.
      heads: share of the heads to remove, likewise.
      multiple: number that the neurons of a layer are a multiple of afterwards.
      budget: share of the model that may stay, or None.
      head_units: numbers of units of heads that a checkpoint can have.
    """

    ffn: float = 0.0
    heads: float = 0.0
    multiple: int = 1
    budget: float | None = None
    head_units: tuple[int, ...] = ()

    @property
    def narrows(self) -> bool:
        """Whether neurons or heads are to go."""
        return bool(self.budget or self.ffn or self.heads)


def keep_layers(model: LoadedModel, kept: Sequence[int]) -> LoadedModel:
    """The model with these of its layers alone."""
    small = model.reshaped(*hf.keep_layers(model.config, model.params, kept))
    # A layer that moved up is still stored in its own dtypes.
    names = {
        name: model.names[name_before(name, kept)]
        for name in jp.tree.names(small.params)
    }
    return small._replace(names=names)


def search_layers(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    layers: int,
    *,
    batch: int,
    work: Path,
    note: Callable[[str], None],
) -> layer_search.LayerSearch:
    """The layers that a search leaves; each that went is noted on disk.

    Args:
      model: model with its parameters in memory.
      tokens: tokens of the calibration.
      layers: number of layers that stay.
      batch: number of sequences that the model sees at once.
      work: directory of the progress.
      note: function that says what became of the search.

    Returns:
      The layers that stay, and those that went with the loss without them.
    """
    place, total = work / _SEARCHED, model.config.layers
    begun = layer_search.LayerSearch(**read_json(place)) if place.is_file() else None
    if begun and len(begun.kept) <= layers:  # a search of the budget went further
        dropped = begun.dropped[: total - layers]
        kept = [layer for layer in range(total) if layer not in dropped]
        return layer_search.LayerSearch(kept, dropped, begun.nats[: len(dropped)])
    remaining = len(begun.kept) if begun else total
    passes = sum(range(layers + 1, remaining + 1)) + 1  # and one of the dense model
    batches = passes * -(-len(tokens) // batch)
    with Progress(batches, "searching layers", unit="batch", leave=False) as progress:
        result = layer_search.search_layers(
            model.graphdef,
            model.params,
            tokens,
            layers,
            batch=batch,
            start=begun,
            progress=progress.update,
            save=lambda search: atomic.replace_json(place, search._asdict()),
        )
    steps = zip(result.dropped, result.nats, strict=True)
    note(
        "KL(dense || smaller) in nats a token, as layers went: "
        + (", ".join(f"{layer}: {nats:.4f}" for layer, nats in steps) or "none did")
    )
    return result


def without_experts(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    share: float,
    *,
    batch: int,
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model with the experts of each layer that score highest, and the scores.

    Args:
      model: mixture of experts with its parameters in memory.
      tokens: tokens of the calibration.
      share: share of the experts of each layer that goes.
      batch: number of sequences that the model sees at once.

    Returns:
      The smaller model; the kept experts, scores and tokens of each layer.
    """
    with Progress(len(tokens), "scoring experts", leave=False) as progress:
        scores, routed = expert_scores(
            model.graphdef, model.params, tokens, batch=batch, progress=progress.update
        )  # (layers, experts) both
    smaller, kept = keep_best_experts(model, scores, share)
    record = {"kept": kept, "scores": scores.tolist(), "tokens": routed.tolist()}
    return smaller, record


def keep_best_experts(
    model: LoadedModel, scores: Float[np.ndarray, "layers experts"], share: float
) -> tuple[LoadedModel, list[list[int]]]:
    """The model with the experts of each layer whose scores are highest.

    Args:
      model: mixture of experts with its parameters in memory.
      scores: scores of the experts, (layers, experts).
      share: share of the experts of each layer that goes.

    Returns:
      The smaller model, and the experts that each layer keeps, in ascending order.
    """
    count = model.config.experts
    remaining = count - round(share * count)
    # Of equal scores the first stays.
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :remaining]
    kept = np.sort(highest, axis=1).tolist()
    return model.reshaped(*hf.keep_experts(model.config, model.params, kept)), kept


def narrow(
    model: LoadedModel,
    narrowing: Narrowing,
    tokens: Int[np.ndarray, "sequences length"] | None,
    *,
    batch: int,
    work: Path,
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model with fewer heads and neurons, and the report of what became fewer.

    Args:
      model: model with all its parameters in memory.
      narrowing: number of heads and neurons to remove.
      tokens: tokens of the calibration; None goes by the weights alone.
      batch: number of sequences that the model sees at once, at most.
      work: directory of the progress, where each layer is kept, so that a killed call
        goes on.

    Returns:
      The smaller model; the report, as of `jp.shrink`, with "roles" of its groups.
    """
    fn, example, groups = group_axes(model)
    roles = group_roles(groups, model.config)
    request = narrowing_request(narrowing, roles, model.config)
    if tokens is None:
        scores = jp.scores.magnitude(model.params)
        result = jp.shrink(fn, model.params, [example], scores, **request)
    else:
        batches = equal_batches(tokens, batch)
        # Tokens count by their direction alone: best on real models.
        solver = jp.passes.sparsegpt(relative=True)
        request["directory"] = work / _SOLVED
        result = jp.shrink(fn, model.params, batches, solver, **request)
    report = result.report
    small = with_smaller(model, result.params)
    return small, report_with_roles(report, groups, roles)


def report_with_roles(
    report: dict[str, Any], groups: jp.AxisGroups, roles: Mapping[str, str]
) -> dict[str, Any]:
    """A report of `jp.shrink` with what its groups are, those that stay whole too.

    Args:
      report: report of the groups that lose units.
      groups: axis groups of the model before.
      roles: name of a group to what it is.

    Returns:
      The report with "roles". Its "kept" and "groups" have all groups of a role of
      which one loses units.
    """
    narrowed = {roles[name] for name in report["kept"]}
    whole = {
        group.name: group.units
        for group in groups
        if roles.get(group.name) in narrowed and group.name not in report["kept"]
    }
    kept = report["kept"] | {name: [*range(n)] for name, n in whole.items()}
    sizes = {name: {"before": n, "after": n} for name, n in whole.items()}
    return {
        **report,
        "groups": report["groups"] | sizes,
        "kept": kept,
        "roles": {name: roles[name] for name in kept},
    }


def with_smaller(model: LoadedModel, params: Any) -> LoadedModel:
    """The model that has these smaller parameters."""
    return model.reshaped(hf.resized(model.config, params), params)


def group_axes(
    model: LoadedModel,
) -> tuple[Any, jax.ShapeDtypeStruct, jp.AxisGroups]:
    """The model as a function of parameters and tokens, a batch of it, its groups."""
    # What the head reads is enough to find the groups by, and to calibrate on.
    fn = functools.partial(_final_states, model.graphdef)
    shape = (1, min(_PROMPT, model.config.context))
    batch = jax.ShapeDtypeStruct(shape, np.int32)
    return fn, batch, jp.axis_groups(fn, model.params, batch)


def narrowing_request(
    narrowing: Narrowing, roles: Mapping[str, str], config: DecoderConfig
) -> dict[str, Any]:
    """The arguments of `jp.shrink`, by the names of groups."""
    request: dict[str, Any]
    sizes: dict[str, Collection[int]] = {}
    if narrowing.multiple > 1:
        sizes["ffn"] = [*multiples(narrowing.multiple, config.mlp_width)]
    if narrowing.budget is None:
        shares = {
            "ffn": narrowing.ffn,
            "heads": narrowing.heads,
        }
        keep = {n: 1 - shares[role] for n, role in roles.items() if role in shares}
        request = {"keep": keep}
    else:
        groups = {n: 1.0 for n, role in roles.items() if role in ("ffn", "heads")}
        request = {"keep": {"parameters": narrowing.budget}, "groups": groups}
        # A share of the heads is checked by the command; a budget chooses it here.
        sizes["heads"] = [*narrowing.head_units]
    return request | {"sizes": {n: sizes[r] for n, r in roles.items() if r in sizes}}


def equal_batches(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Batches of one size, the largest that leaves no sequence over."""
    size = max(n for n in range(1, most + 1) if len(tokens) % n == 0)
    return np.split(tokens, len(tokens) // size)  # (size, length) each


def _final_states(graphdef: Any, params: Any, tokens: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return model.states(model.embed(tokens))[0]  # (batch, length, width)


def group_roles(groups: jp.AxisGroups, config: DecoderConfig) -> dict[str, str]:
    """Name of a group to what it is: "ffn", "heads", "query heads"."""
    names = {group.dim: group.name for group in groups}
    dims = {leaf.name: leaf.parts[0] for leaf in groups.trace.leaves}
    roles = {}
    for layer in range(config.layers):
        if not config.experts:
            roles[names[root(dims[f"layers/{layer}/{_DOWN}"][0])]] = "ffn"
        # Key heads x query heads of each x features; those of one are left out.
        inputs = root(dims[f"layers/{layer}/{_OUT}"][0])
        parts = inputs.parts or [inputs]
        if config.heads > 1:
            roles[names[root(parts[0])]] = "heads"
        if 1 < config.kv_heads < config.heads:
            roles[names[root(parts[1])]] = "query heads"
    return roles
