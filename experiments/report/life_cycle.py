"""When pruning has paid for itself: what it cost once beside what a served token saves.

Energy is computed from the number of FLOPs and the bytes of weights that are read from
memory, both at Horowitz's figures. Where codecarbon measured the energy of training,
everything is scaled by measured / computed energy of the training. So a pay-back time
does not depend on the hardware's overhead, only on the ratio of the cost of a byte to
the cost of a FLOP.

Reference:
  Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014: a
  float32 multiplication 3.7 pJ and an addition 0.9 pJ, 32 bits of DRAM 640 pJ (45 nm).
  A kilowatt-hour is 0.475 kg of CO2 where it was not measured: the world's mean,
  IEA, "Global Energy & CO2 Status Report", 2019.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report import findings, plots
from jaxprune.lm.report import canvas

JOULES_A_FLOP = (3.7e-12 + 0.9e-12) / 2
JOULES_A_BYTE = 640e-12 / 4
CO2_KG_A_KWH = 0.475
# Bytes a weight and step: read forward and backward, the gradient written and read,
# Adam's moments and the weight read and written.
TRAINING_BYTES = 8 + 8 + 24
# Of each average: read and written in float32.
TRACKING_BYTES = 8
_USUAL = ("square", "weight")  # in results that do not say which were held
BATCHES = (1, 32)
TITLE = "After how many served tokens pruning has paid for itself"


@dataclasses.dataclass(frozen=True)
class Serving:
    """Joules a served token of one sparsity.

    Attributes:
      dense: all weights read, all FLOPs done. Zeros in a dense matrix cost as much.
      packed: kept values and one bit a weight read, all FLOPs done.
      skipped: likewise, and only the FLOPs of what is kept.
    """

    dense: float
    packed: float
    skipped: float


@dataclasses.dataclass(frozen=True)
class LifeCycle:
    """What pruning costs once and what serving then costs, means over the seeds.

    Attributes:
      training: joules of the dense training, for comparison.
      tracking: joules of the averages during it.
      sweep: joules of all cells' ranking, pruning and evaluation.
      retraining: joules of one model's retraining.
      serving: joules for each batch size and sparsity.
      measured: whether energy was measured or only counted.
      co2: kilograms a joule.
    """

    training: float
    tracking: float
    sweep: float
    retraining: float
    serving: Mapping[int, Mapping[float, Serving]]
    measured: bool
    co2: float

    @property
    def once(self) -> float:
        """Joules that a pruned model needs and a dense one does not."""
        return self.tracking + self.sweep + self.retraining


def from_results(results: Mapping[str, Any]) -> LifeCycle | None:
    """The life cycle that these results tell of.

    None where costs, phases or the tokens of training are not known.
    """
    phases, costs = _phase_means(results), results.get("costs")
    training = phases.get("train")
    if "control" in phases and not phases["control"]["share"]:
        return None  # begun again after its last step: nobody knows what it took
    if not costs or not training or not training["tokens"] or not training["seconds"]:
        return None
    steps = float(np.mean([seed["dense"]["steps"] for seed in results["seeds"]]))
    weights = results["model"]["parameters"]
    # Backward costs twice the forward: gradients of the inputs and of the weights.
    arithmetic = 3 * costs[0]["flops_dense"] * training["tokens"] * JOULES_A_FLOP
    moved = TRAINING_BYTES * weights * steps * JOULES_A_BYTE  # joules, as all below
    average_count = len(results.get("averages") or _USUAL)
    tracked = average_count * TRACKING_BYTES * results["model"]["prunable"] * steps
    tracked *= JOULES_A_BYTE
    # Of a training that went on from a checkpoint only this start was measured.
    share = training["share"]
    computed = arithmetic + (moved + tracked) * share
    # A kilowatt-hour is 3.6 MJ; 0 where codecarbon did not measure.
    spent = 3.6e6 * training["energy_kwh"] or computed
    scale = spent / computed

    def cost(name: str) -> float:
        """Joules of a phase, as its seconds are to those of training."""
        phase = phases.get(name, dict.fromkeys(_SUMMED, 0.0))
        measured = 3.6e6 * phase["energy_kwh"]
        # The same machine at the same work: energy goes with time.
        return measured or spent * phase["seconds"] / training["seconds"]

    def done(name: str) -> float:
        """The share of a phase that was measured, as of training."""
        return phases.get(name, {}).get("share") or 1.0

    measured = training["energy_kwh"] > 0
    co2 = training["co2_kg"] / spent if measured else CO2_KG_A_KWH / 3.6e6
    return LifeCycle(
        training=spent / share - scale * tracked,
        tracking=scale * tracked,
        sweep=cost("prune"),
        # The control takes the very steps that a pruned model does.
        retraining=cost("control") / done("control"),
        serving={
            batch: {row["sparsity"]: _serving(row, batch, scale) for row in costs}
            for batch in BATCHES
        },
        measured=measured,
        co2=co2,
    )


_SUMMED = ("tokens", "share", "seconds", "energy_kwh", "co2_kg")


def _phase_means(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What each phase took, `_SUMMED`, by its name: means over the seeds."""
    seeds = len(results["seeds"])
    phases: dict[str, dict[str, float]] = {}
    for phase in results.get("phases") or ():
        total = phases.setdefault(phase["name"], dict.fromkeys(_SUMMED, 0.0))
        rate = phase.get("tokens_per_second") or 0.0
        total["tokens"] += rate * phase["seconds"] / seeds
        total["share"] += phase.get("share", 1.0) / seeds
        for name in _SUMMED[2:]:
            total[name] += (phase.get(name) or 0.0) / seeds
    return phases


def _serving(row: Mapping[str, Any], batch: int, scale: float) -> Serving:
    """Joules a token where `batch` tokens share one reading of the weights."""

    def joules(bytes_: float, flops: float) -> float:
        # Weights are read once for a batch, and multiplied for each of its tokens.
        return scale * (bytes_ / batch * JOULES_A_BYTE + flops * JOULES_A_FLOP)

    return Serving(
        joules(row["bytes_dense"], row["flops_dense"]),
        joules(row["bytes_packed"], row["flops_dense"]),
        joules(row["bytes_packed"], row["flops_kept"]),
    )


def pays_back(once: float, dense: float, pruned: float) -> float | None:
    """Served tokens after which `once` is saved; None where nothing is saved."""
    return once / (dense - pruned) if pruned < dense else None


def section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page says of it: a figure, two tables and a note; None without costs."""
    cycle = from_results(results)
    if cycle is None:
        return None
    once = [
        ["training, dense", _energy(cycle.training), _mass(cycle.training, cycle)],
        ["tracking", _energy(cycle.tracking), _mass(cycle.tracking, cycle)],
        ["sweep of all cells", _energy(cycle.sweep), _mass(cycle.sweep, cycle)],
        ["retraining", _energy(cycle.retraining), _mass(cycle.retraining, cycle)],
    ]
    return {
        "title": TITLE,
        "drawn": {"life-cycle": figure(cycle)},
        "once": {"header": ["once", "energy", "CO₂"], "rows": once},
        "served": {
            "header": [
                "tokens at once",
                "sparsity",
                "dense, a million tokens",
                "packed weights",
                "and zeros skipped",
                "paid back after: packed",
                "and zeros skipped",
            ],
            "rows": [
                _served_row(cycle, batch, sparsity)
                for batch, by_sparsity in cycle.serving.items()
                for sparsity in by_sparsity
            ],
        },
        "measured": cycle.measured,
    }


def _served_row(cycle: LifeCycle, batch: int, sparsity: float) -> list[str]:
    """What a million tokens cost at a sparsity, and after how many it is paid back."""
    serving = cycle.serving[batch][sparsity]
    ways = [serving.dense, serving.packed, serving.skipped]  # joules a token
    row = [str(batch), findings.percent(sparsity)]
    row += [_energy(1e6 * joules) for joules in ways]
    for joules in ways[1:]:
        tokens = pays_back(cycle.once, serving.dense, joules)
        row.append("never" if tokens is None else f"{tokens:,.0f}")
    return row


def _energy(joules: float) -> str:
    """Joules, or watt-hours from 3600 of them on."""
    return f"{joules / 3600:,.3g} Wh" if joules >= 3600 else f"{joules:,.3g} J"


def _mass(joules: float, cycle: LifeCycle) -> str:
    return f"{1000 * joules * cycle.co2:,.3g} g"


@canvas.STYLE
def figure(cycle: LifeCycle) -> Figure:
    """Joules beyond the dense training against served tokens, one token at a time."""
    by_sparsity = cycle.serving[BATCHES[0]]
    names = [f"{findings.percent(sparsity)} packed" for sparsity in by_sparsity]
    style = plots.styles(names)
    canvas_figure, (axes,) = plots.panels(1, ["dense", *names])
    paid = [
        pays_back(cycle.once, serving.dense, serving.packed)
        for serving in by_sparsity.values()
    ]
    # The axis is centred where curves cross: there pruning has paid for itself.
    middle = float(np.median([tokens for tokens in paid if tokens] or [1e6]))
    tokens = np.geomspace(middle / 30, middle * 30, 60)
    first = next(iter(by_sparsity.values()))
    ends = [("dense", canvas.INK, tokens[-1], tokens[-1] * first.dense)]
    axes.plot(tokens, tokens * first.dense, color=canvas.INK, lw=1.2)
    for name, serving in zip(names, by_sparsity.values(), strict=True):
        energy = cycle.once + tokens * serving.packed
        line = style[name]
        axes.plot(tokens, energy, color=line.colour, ls=line.dash)
        ends.append((name, line.colour, tokens[-1], float(energy[-1])))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(tokens[0], tokens[-1])
    axes.set_xlabel("served tokens")
    axes.set_title("Joules beyond the dense training")
    for axis in (axes.xaxis, axes.yaxis):  # text in a figure is never parsed as TeX
        axis.set_major_formatter(lambda value, _: f"{value:,.15g}")
        axis.set_minor_formatter(lambda value, _: "")
    plots.name_ends(axes, ends)
    return canvas_figure
