"""Layers of different sizes: neurons and heads go where they are missed least.

Every layer's neurons and heads are solved at several sizes once, on three quarters of
the calibration's sequences, in the model whose layers are cut alike
(`posttraining.unit_sizes`). The last quarter judges, by KL(whole model || smaller one)
over the whole model's likeliest tokens and the sum of all others: how far the model
with equal layers moves when one group has another size is the damage of that size. A
knapsack and a short search (`size_choice`) then choose the sizes that have as many
parameters together as equal layers. At the end these sizes are solved as any others
are: layer after layer, on all sequences. What was solved, measured and chosen is kept
in the directory of progress.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.recovery import predictions, sampled_tokens
from jaxprune.lm.shrinking import size_choice, units
from jaxprune.lm.shrinking.size_choice import Choice, Menu
from jaxprune.lm.shrinking.units import Narrowing
from jaxprune.posttraining.unit_sizes import SolvedSizes, solve_sizes
from jaxprune.structured import shrink as structured

# In the progress.
_SOLVED, _DAMAGES, _SIZES, _LAST = "sizes", "damages.json", "sizes.json", "units"
_PREDICTIONS = "judging"
STEPS = 8
"""Parts of a layer by which the numbers of its units differ."""
_GENERATIONS = 24
_RADII = (1, 2, 3, STEPS)  # steps from equal layers that the knapsack may go
_FEW = 4  # parts of the judging sequences, one of which is asked first


class _Task(NamedTuple):
    """What is chosen from.

    Attributes:
      model: model whose layers are cut.
      solved: group name to its sizes.
      start: group name to the number of units that equal layers keep.
      costs: group name to the parameters of one unit.
    """

    model: LoadedModel
    solved: Mapping[str, SolvedSizes]
    start: Mapping[str, int]
    costs: Mapping[str, int]


def narrow_unequally(
    model: LoadedModel,
    narrowing: Narrowing,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int,
    work: Path,
    note: Callable[[str], None],
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model with as many parameters as `units.narrow` leaves, layers unlike.

    Args:
      model: model with all its parameters in memory.
      narrowing: number of heads and neurons to remove, of equal layers.
      tokens: tokens of the calibration.
      batch: number of sequences that the model sees at once, at most.
      work: directory of the progress.
      note: function that says what became of the choice.

    Returns:
      The smaller model, whose `config.layer_sizes` says its sizes; the report, as of
      `units.narrow`, with "unequal": the nats of KL with equal layers, with the sizes
      of the knapsack and after the search, and the sizes of each layer.

    Raises:
      OutOfReach: the budget is out of reach.
      ValueError: see `jp.shrink`.
    """
    fn, _, groups = units.group_axes(model)
    roles = units.group_roles(groups, model.config)
    start = equal_sizes(groups, narrowing, roles, model.config)
    chosen_groups = [group for group in groups if group.name in start]
    judging = -(-len(tokens) // 4)
    # (sequences, length) each
    calibrating, judges = np.split(tokens, [len(tokens) - judging])
    solved = solve_sizes(
        fn,
        model.params,
        units.equal_batches(calibrating, batch),
        groups,
        {
            group.name: _ladder(
                group.units,
                start[group.name],
                narrowing.multiple if roles[group.name] == "ffn" else 1,
                none=_may_be_absent(model.config, roles[group.name]),
            )
            for group in chosen_groups
        },
        start,
        directory=work / _SOLVED,
    )
    costs = {group.name: group.weights // group.units for group in chosen_groups}
    task = _Task(model, solved, start, costs)
    few = units.equal_batches(judges, min(batch, -(-judging // _FEW)))
    sizes, nats = _choose(task, few, work, note)
    counts = {group.name: group.units for group in chosen_groups}
    batches = units.equal_batches(tokens, batch)
    small, report = _solve_chosen(
        model, sizes, counts, roles, batches, narrowing.correction, work / _LAST
    )
    by_layer = [small.config.sizes(layer) for layer in range(small.config.layers)]
    return small, {**report, "unequal": {**nats, "layers": by_layer}}


def passes_of_judge(layers: int) -> float:
    """How often all sequences would be run to measure and to search the sizes.

    Args:
      layers: number of layers of the model.

    Returns:
      The number, for an estimate.
    """
    # A quarter of the sequences judges, and a part of that is asked first.
    groups, few, judging = 2 * layers, 1 / (4 * _FEW), 1 / 4
    return 4 * groups * few + _GENERATIONS * (7 * few + judging)


def equal_sizes(
    groups: jp.AxisGroups,
    narrowing: Narrowing,
    roles: Mapping[str, str],
    config: DecoderConfig,
) -> dict[str, int]:
    """How many units groups keep where all layers are cut alike, by shapes alone.

    Args:
      groups: axis groups of the model.
      narrowing: number of heads and neurons to remove.
      roles: name of a group to what it is.
      config: shape of the model.

    Returns:
      Group name to the number.

    Raises:
      OutOfReach: the budget is out of reach.
    """
    request = units.narrowing_request(narrowing, roles, config)
    lost = structured.lost_units(
        groups,
        request.get("sparsity"),
        request.get("budget", {}).get(narrowing.measure),
        narrowing.measure,
        request.get("groups", ("*",)),
        request["sizes"],
    )
    return {g.name: g.units - lost[g.name] for g in groups if g.name in lost}


def _ladder(units_: int, start: int, multiple: int, *, none: bool) -> list[int]:
    """The numbers of units to solve, ascending, that of equal layers among them."""
    steps = {round(units_ * i / STEPS) for i in range(1, STEPS + 1)}
    fitting = {-(-size // multiple) * multiple for size in steps if size}
    inside = {size for size in fitting if size < units_}
    return sorted({start, units_, *inside, *([0] if none else [])})


def _may_be_absent(config: DecoderConfig, role: str) -> bool:
    """Whether a layer without these units computes what zeros in their place do."""
    biased = config.out_bias if role == "heads" else config.mlp_bias
    # A norm behind them makes zeros of zeros, unless it has a bias.
    return config.norm.startswith("rms") and not biased


def _choose(
    task: _Task,
    judges: Sequence[np.ndarray],
    work: Path,
    note: Callable[[str], None],
) -> tuple[dict[str, int], dict[str, float]]:
    """The size of each group; the divergences with equal and with chosen sizes."""
    judge = _Judge(task, judges, work)
    menus = _measured_menus(task, judge, work / _DAMAGES)
    places = {name: menu.sizes.index(task.start[name]) for name, menu in menus.items()}
    budget = size_choice.total_cost(menus, places)

    @functools.cache
    def nats_of(sizes: tuple[tuple[str, int], ...], batches: int | None) -> float:
        return judge.nats(dict(sizes), batches)

    def loss(choice: Choice, batches: int | None) -> float:
        pairs = ((name, menus[name].sizes[place]) for name, place in choice.items())
        return nats_of(tuple(pairs), batches)

    state_file = work / _SIZES
    if state_file.is_file():
        content = read_json(state_file)
        nats, state = content["nats"], size_choice.Progress(**content["state"])
    else:
        # Far from equal layers damages add up badly, and may ruin the model.
        near = [
            size_choice.choose_near(menus, places, budget, radius) for radius in _RADII
        ]
        by_damage = min(near, key=lambda choice: loss(choice, None))
        nats = {"equal": loss(places, None), "knapsack": loss(by_damage, None)}
        best = by_damage if nats["knapsack"] < nats["equal"] else places
        state = size_choice.Progress(best, min(nats.values()), 0)
    with Progress(_GENERATIONS, "searching sizes", unit="generation") as shown:
        shown.update(state.generation)

        def save(state: size_choice.Progress) -> None:
            atomic.replace_json(state_file, {"nats": nats, "state": state._asdict()})
            shown.update(1)

        state = size_choice.search_sizes(
            menus, state, budget, loss, generations=_GENERATIONS, save=save
        )
    nats = {**nats, "searched": state.loss}
    note(
        "KL(dense || smaller) in nats a token, before all is solved once more: "
        + ", ".join(f"{name} {value:.4f}" for name, value in nats.items())
    )
    sizes = {name: menus[name].sizes[place] for name, place in state.choice.items()}
    return sizes, nats


class _Judge:
    """How far the model with some sizes is from the whole one, on a few sequences."""

    def __init__(self, task: _Task, batches: Sequence[np.ndarray], work: Path) -> None:
        """Lets the whole model predict `batches`, tokens (size, length) each."""
        model, size = task.model, len(batches[0])
        sequences = np.concatenate(batches)
        kept = predictions.keep_predictions(
            model.decoder(), sequences, work / _PREDICTIONS, batch=size
        )
        # The head is that of the whole model, whatever the layers lost: most of a
        # large one's logits are the same from size to size, and small.
        sampler = sampled_tokens.sampler_of(
            model.config.vocab_size, sequences, kept.likeliest, batch=size
        )
        loss = predictions.from_predictions(kept, sampler=sampler)
        graphdef = model.graphdef

        @jax.jit
        def nats(params: Any, arrays: Any, ids: Any) -> Float[jax.Array, ""]:
            return loss.fn(nnx.merge(graphdef, params), arrays, ids)

        self._nats = nats
        rows = np.split(np.arange(len(sequences)), len(batches))
        self._batches = [(loss.arrays_of(places), sequences[places]) for places in rows]
        self._solved = task.solved
        self._leaves = jp.tree.named_leaves(model.params)
        self._structure = jax.tree.structure(model.params)
        self._matrices: dict[str, tuple[int, jax.Array]] = {}  # one of each group

    def nats(self, sizes: Mapping[str, int], batches: int | None) -> float:
        """The mean KL(whole || smaller), nats a token, on the first batches."""
        leaves = dict(self._leaves)
        for name, size in sizes.items():
            leaf = self._solved[name].leaf
            leaves[leaf] = self._matrix(name, size).astype(leaves[leaf].dtype)
        params = jax.tree.unflatten(self._structure, list(leaves.values()))
        chosen = self._batches[:batches]
        return float(np.mean([self._nats(params, *pair) for pair in chosen]))

    def _matrix(self, name: str, size: int) -> jax.Array:
        """The matrix of a group at a size; the last of each group stays in memory."""
        if name not in self._matrices or self._matrices[name][0] != size:
            self._matrices[name] = size, jnp.asarray(self._solved[name].read(size))
        return self._matrices[name][1]


def _measured_menus(task: _Task, judge: _Judge, file: Path) -> dict[str, Menu]:
    """The sizes of each group with their damages beside equal layers."""
    known: dict[str, dict[str, float]] = read_json(file) if file.is_file() else {}
    equal = dict(task.start)
    with Progress(len(equal), "measuring sizes", unit="group") as shown:
        before = judge.nats(equal, 1)
        for name, solved in task.solved.items():
            if name not in known:
                known[name] = {
                    str(size): judge.nats({**equal, name: size}, 1) - before
                    for size in _measured_sizes(solved.sizes, equal[name])
                }
                atomic.replace_json(file, known)
            shown.update(1)
    return {
        name: _menu(solved, known[name], equal[name], task.costs[name])
        for name, solved in task.solved.items()
    }


def _measured_sizes(sizes: Sequence[int], start: int) -> list[int]:
    """The sizes of a group that are measured: all of few; two below and two above."""
    place = sizes.index(start)
    last = len(sizes) - 1
    if last <= _FEW:  # heads, say
        return [size for size in sizes if size != start]
    # Upwards alone says too little: the first units that go cost least.
    places = {max(place - 1, 0), place // 2, (place + last) // 2, last} - {place}
    return [sizes[i] for i in sorted(places)]


def _menu(
    solved: SolvedSizes, measured: Mapping[str, float], start: int, unit_cost: int
) -> Menu:
    """The damages of all sizes: between those measured they go with the error."""
    points = {start: 0.0, **{int(size): nats for size, nats in measured.items()}}
    errors = dict(zip(solved.sizes, solved.errors, strict=True))
    ordered = sorted(points, key=lambda size: errors[size])
    known = np.array([[errors[size], points[size]] for size in ordered])
    damages = np.interp(solved.errors, *known.T)  # (sizes,)
    # Past the last that was measured it goes on as between the last two.
    (inner, least), (outer, most) = known[-2:]
    slope = (most - least) / max(outer - inner, np.finfo(np.float32).tiny)
    beyond = np.maximum(np.array(solved.errors) - outer, 0)  # (sizes,)
    damages = damages + max(slope, 0.0) * beyond
    costs = tuple(size * unit_cost for size in solved.sizes)
    return Menu(solved.sizes, costs, tuple(damages.tolist()))


def _solve_chosen(
    model: LoadedModel,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    roles: Mapping[str, str],
    batches: Sequence[np.ndarray],
    correction: float,
    directory: Path,
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model at the chosen sizes, solved layer after layer, and the report."""
    absent = [name for name, size in sizes.items() if not size]
    before = structured.whole_costs(units.group_axes(model)[2])._asdict()
    model = units.without_parts(
        model, {(int(name.split("/")[1]), roles[name]) for name in absent}
    )
    fn, _, groups = units.group_axes(model)
    shares = {g.name: 1 - sizes[g.name] / g.units for g in groups if g.name in sizes}
    result = jp.shrink(
        fn,
        model.params,
        batches[0],
        sparsity=shares,
        batches=batches,
        relative=True,
        correction=correction,
        directory=directory,
    )
    report = result.report | {"before": before}
    small = units.with_smaller(model, result.params)
    report["kept"] |= {name: [] for name in absent}
    report["groups"] |= {name: {"before": counts[name], "after": 0} for name in absent}
    return small, units.report_with_roles(report, groups, roles)
