"""How a budget is divided over neurons, heads and whole layers: by the loss.

The model is made smaller in each of a few ways that cost the same, with three quarters
of the calibration's sequences, and the last quarter says which way costs least. First
the heads' share is chosen, then layers go as long as that is better.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.cli import models, shrink_units
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.shrink_options import Job
from jaxprune.lm.measure import perplexity
from jaxprune.structured import shrink
from jaxprune.structured.budget import OutOfReach

_TRIED = "search.json"
_HEADS = (1.0, 0.5, 0.0)  # how large a share of the heads goes, beside the neurons'


class Divided(NamedTuple):
    """How the budget is divided.

    Attributes:
      layers: how many layers stay.
      budget: the share of what these cost that may be left; 1 leaves them as they are.
      heads: the share of the heads that goes, beside that of the neurons.
      tried: JSON-able: a row for each way, with "layers", "heads" and "nats", the loss
        a token; null where the budget was out of reach.
    """

    layers: int
    budget: float
    heads: float
    tried: list[dict[str, Any]]


def divide(
    job: Job, model: models.Model, tokens: np.ndarray, console: Console
) -> Divided:
    """Tries ways to divide the budget; each that was tried is noted on disk."""
    search = _Search(job, model, tokens, console)
    best = min((search.way(0, heads) for heads in _HEADS), key=_loss)
    for gone in range(1, model.config.layers):
        if search.budget(gone - 1) == 1:  # without those alone the budget was met
            break
        found = search.way(gone, best["heads"])
        if best["nats"] is not None and _loss(found) >= _loss(best):
            break
        best = found
    if best["nats"] is None:
        raise ValueError(
            f"a budget must be within reach, but {job.budget:g} of the {job.measure} "
            "is not, with one unit of each kind and one layer left; ask for more"
        )
    gone = model.config.layers - best["layers"]
    return Divided(best["layers"], search.budget(gone), best["heads"], search.tried)


def _loss(way: dict[str, Any]) -> float:
    return math.inf if way["nats"] is None else way["nats"]


class _Search:
    """The ways that were tried, in this process and before it was stopped."""

    def __init__(
        self, job: Job, model: models.Model, tokens: np.ndarray, console: Console
    ) -> None:
        self._job, self._model, self._console = job, model, console
        held = -(-len(tokens) // 4)
        # (sequences, length) each
        self._tokens, judges = np.split(tokens, [len(tokens) - held])
        counted = np.ones((held, tokens.shape[1] - 1), bool)
        self._judges = perplexity.Windows(judges, counted, {})
        self._smaller: dict[int, models.Model] = {0: model}
        self._costs: dict[int, int] = {}
        place = job.work / _TRIED
        self.tried = read_json(place)["tried"] if place.is_file() else []

    def way(self, gone: int, heads: float) -> dict[str, Any]:
        """The loss without so many layers and with the rest of the budget met."""
        layers = self._model.config.layers - gone
        for past in self.tried:
            if (past["layers"], past["heads"]) == (layers, heads):
                return past
        nats = self._nats(gone, heads)
        own = {"layers": layers, "heads": heads, "nats": nats}
        said = "out of reach" if nats is None else f"{nats:.4f} nats a token"
        self._console.note(f"{layers} layers, heads {heads:g} of neurons: {said}")
        self.tried.append(own)
        atomic.replace_json(self._job.work / _TRIED, {"tried": self.tried})
        return own

    def budget(self, gone: int) -> float:
        """The share of the model without so many layers that may be left, at most 1."""
        return min((self._job.budget or 1) * self._cost(0) / self._cost(gone), 1.0)

    def _cost(self, gone: int) -> int:
        """What the model without so many layers costs, by the job's measure."""
        if gone not in self._costs:
            groups = shrink_units.grouped(self._without(gone))[2]
            self._costs[gone] = getattr(shrink.whole_costs(groups), self._job.measure)
        return self._costs[gone]

    def _without(self, gone: int) -> models.Model:
        if gone not in self._smaller:
            layers = self._model.config.layers - gone
            self._smaller[gone], _ = shrink_units.without_layers(
                self._job, self._model, self._tokens, layers, self._console
            )
        return self._smaller[gone]

    def _nats(self, gone: int, heads: float) -> float | None:
        small, budget = self._without(gone), self.budget(gone)
        if budget < 1:
            try:
                small, _ = shrink_units.narrower(
                    self._job, small, self._tokens, budget, heads
                )
            except OutOfReach:
                return None
        measured = perplexity.measure_perplexity(
            small.decoder(), self._judges, batch=self._job.batch
        )
        found: float | None = measured["nats"]
        return found
