"""What the numbers of one run say, in sentences and choices computed from them alone.

"Within" a reference means at most `results.CLOSE` nats above it, at this sparsity
and at every lower one that was tested. The reference is the dense model right after
pruning, and after retraining the dense control with as many steps in all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import results as results_

CLOSE_SHARE = 0.01  # of the reference's loss
_KNOWS = 0.75  # of guessing by frequency: more than this has not learnt the text
_TYPICAL = 0.6  # the sparsity whose layers are shown
_WATCHED = ("averaged_weight", "preconditioned_magnitude", "magnitude")


def headline(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences that are computed and nothing else.

    First how far the best criterion goes at equal steps, then how far right after
    pruning, then whether pruning ever lowered the loss. Of a model that is not trained
    it says that alone.
    """
    if note := untrained(results):
        return [note]
    count = len(results["seeds"])
    over = f"mean of {count} seeds" if count > 1 else "one seed"
    extra = results_.extra_steps(results)
    sentences = []
    for stage, start, reference in (
        (
            "retrained",
            f"Retrained for {extra} steps{_held(results)}, ",
            "the dense model given the same steps",
        ),
        ("pruned", "Right after pruning, ", "the dense model"),
    ):
        curves = results_.curves(results, stage)  # type: ignore[arg-type]
        if curves:
            sentences.append(f"{start}{_furthest(curves, reference)} ({over}).")
    retrained = results_.curves(results, "retrained")
    return sentences + ([_lowest(retrained)] if retrained else [])


def untrained(results: Mapping[str, Any]) -> str:
    """What a model that learnt nothing, or a smoke run, says; empty for another one."""
    seeds = results["seeds"]
    loss = float(np.mean([seed["dense"]["loss"] for seed in seeds]))
    steps = f"{seeds[0]['dense']['steps']} steps"
    guessed = results["model"].get("nats_by_frequency")
    nothing = "the numbers show that the program runs, and nothing about pruning."
    if guessed is not None and loss > _KNOWS * guessed:
        return (
            f"Not trained: after {steps} the dense loss is {loss:.2f} nats, and "
            f"guessing by frequency alone has {guessed:.2f}; {nothing}"
        )
    if results["config"].get("smoke"):
        return f"Not trained: a smoke run of {steps}; {nothing}"
    return ""


def _held(results: Mapping[str, Any]) -> str:
    """How it was retrained; "gradual" prunes in these steps."""
    criteria = {
        cell["criterion"] for seed in results["seeds"] for cell in seed["cells"]
    }
    return "" if "gradual" in criteria else " with the mask held"


def _furthest(curves: Sequence[results_.Curve], reference: str) -> str:
    """Which criteria stay close to the reference up to the highest sparsity."""
    reaches = {
        title(curve, curves): curve.reach(results_.CLOSE) or 0.0 for curve in curves
    }
    best = max(reaches.values())
    if best == 0:
        return f"no criterion stays within {results_.CLOSE} nats of {reference}"
    # Sparsities are a grid, so several criteria may reach the same one.
    first = [name for name, reach in reaches.items() if reach == best]
    lower = [reach for reach in reaches.values() if reach < best]
    allocations = {curve.allocation for curve in curves}
    unit = "criteria" if len(allocations) == 1 else "pairs of criterion and allocation"
    several = f"{len(first)} of {len(reaches)} {unit}"
    names = _listed(first) if len(first) <= 3 else several
    verb = "stays" if len(first) == 1 else "stay"
    near = f"{verb} within {results_.CLOSE} nats of {reference}"
    text = f"{names} {near} up to {percent(best)} sparsity"
    if not lower:
        return text
    high = max(lower)
    return f"{text}, no other {f'past {percent(high)}' if high else 'at any'}"


def _lowest(curves: Sequence[results_.Curve]) -> str:
    """Whether any pruned model ended under its control, and whether that is noise."""
    candidates = [
        (float(curve.above[:, column].mean()), curve, column)
        for curve in curves
        for column, sparsity in enumerate(curve.sparsities)
        if sparsity > 0
    ]
    if not candidates:
        return "Nothing but the dense model was retrained."
    lowest, curve, column = min(candidates, key=lambda item: item[0])
    above = curve.above[:, column].compressed()
    place = f"{title(curve, curves)} at {percent(curve.sparsities[column])}"
    if lowest >= 0:
        return (
            f"Pruning never lowered the loss: the lowest of {len(candidates)} is "
            f"{place}, {signed_text(lowest)} nats against the dense control."
        )
    if len(above) < 2:  # the lowest of many, of one seed each, would be noise
        return (
            "Whether pruning lowered a loss cannot be said of one seed, which has no "
            "spread."
        )
    if -lowest > np.std(above, ddof=1):
        noise = ""
    else:
        # The lowest of many cells is under the control by chance alone now and then.
        noise = ", no more than the spread of the seeds"
    return (
        f"The lowest of {len(candidates)} retrained losses is {place}, "
        f"{signed_text(lowest)} nats against the dense control and under it for "
        f"{(above < 0).sum()} of {len(above)} seeds{noise}; a lowest of many flatters."
    )


def percent(share: float) -> str:
    """A share as it is written everywhere: "60 %", "97.5 %"."""
    return f"{100 * share:.4g}\N{NO-BREAK SPACE}%"


def signed_text(nats: float) -> str:
    """A difference of losses as it is written everywhere: "+0.015", "−0.003"."""
    return f"{nats:+z.3f}".replace("-", "−")


def mean(losses: Sequence[float] | np.ndarray, *, signed: bool = False) -> str:
    """Mean and, for several seeds, spread, as written everywhere: "1.908 ± 0.008"."""
    if not len(losses):
        return "-"
    middle = float(np.mean(losses))
    text = signed_text(middle) if signed else f"{middle:.3f}"
    deviation = "" if len(losses) < 2 else f" ± {float(np.std(losses, ddof=1)):.3f}"
    return text + deviation


def title(curve: results_.Curve, among: Sequence[results_.Curve]) -> str:
    """The criterion's name, with the allocation where several are compared."""
    several = len({rival.allocation for rival in among}) > 1
    return f"{curve.criterion} ({curve.allocation})" if several else curve.criterion


def _listed(names: Sequence[str]) -> str:
    """Names as in a sentence: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def watched(results: Mapping[str, Any]) -> list[str]:
    """The criteria whose choice among the sampled weights is drawn: at most three."""
    sampled = results["seeds"][0].get("weights")
    if not sampled:
        return []
    kept = list(sampled["kept"])
    chosen = [name for name in _WATCHED if name in kept]
    return (chosen + [name for name in kept if name not in chosen])[:3]


def layers(
    results: Mapping[str, Any],
) -> tuple[dict[str, dict[str, float]], float, str] | None:
    """Sparsities by leaf, over the seeds: of the most uneven allocation."""
    cells = [
        cell
        for seed in results["seeds"]
        for cell in seed["cells"]
        if cell.get("sparsity_by_leaf") and cell["sparsity"] > 0
    ]
    if not cells:
        return None
    sparsity = min({c["sparsity"] for c in cells}, key=lambda s: abs(s - _TYPICAL))
    cells = [cell for cell in cells if cell["sparsity"] == sparsity]
    # The most uneven: where all matrices lose the same share there is nothing to see.
    allocation = max(
        cells, key=lambda cell: np.ptp([*cell["sparsity_by_leaf"].values()])
    )
    sparsities: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell["allocation"] == allocation["allocation"]:
            sparsities.setdefault(cell["criterion"], {})
    for criterion, by_leaf in sparsities.items():
        leaf_sparsities = [
            cell["sparsity_by_leaf"]
            for cell in cells
            if cell["criterion"] == criterion
            and cell["allocation"] == allocation["allocation"]
        ]
        by_leaf |= {
            leaf: float(np.mean([c[leaf] for c in leaf_sparsities]))
            for leaf in leaf_sparsities[0]
        }
    return sparsities, sparsity, allocation["allocation"]
