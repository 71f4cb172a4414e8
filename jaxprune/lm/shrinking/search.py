"""How a budget is divided over neurons, heads and whole layers: by the loss.

The model is made smaller in each of a few ways that cost the same, with three quarters
of the calibration's sequences, and the last quarter says which way costs least. First
the heads' share is chosen, then layers go as long as that is better.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import units
from jaxprune.lm.shrinking.units import Narrowing
from jaxprune.structured.budget import OutOfReach

LEAST_SEQUENCES = 4  # of a search, a quarter of which judges

_TRIED = "search.json"
_HEADS = (1.0, 0.5, 0.0)  # how large a share of the heads goes, beside the neurons'


class Division(NamedTuple):
    """How the budget is divided.

    Attributes:
      layers: number of layers that stay.
      budget: share of what these cost that may be left; 1 leaves them as they are.
      heads: share of the heads that goes, beside that of the neurons.
      tried: JSON-able: a row for each way, with "layers", "heads" and "nats", the loss
        a token; null where the budget was out of reach.
    """

    layers: int
    budget: float
    heads: float
    tried: list[dict[str, Any]]


def divide_budget(
    model: LoadedModel,
    narrowing: Narrowing,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int,
    work: Path,
    note: Callable[[str], None],
) -> Division:
    """Tries ways to divide the budget; each that was tried is noted on disk.

    Args:
      model: model with its parameters in memory.
      narrowing: budget and what it is of.
      tokens: tokens of the calibration.
      batch: number of sequences that the model sees at once.
      work: directory of the progress.
      note: function that says what became of a way.

    Returns:
      The best way.

    Raises:
      ValueError: no way meets the budget.
    """
    search = _Search(model, narrowing, tokens, batch, work, note)
    best = min((search.way(0, heads) for heads in _HEADS), key=_loss)
    for removed in range(1, model.config.layers):
        if search.budget(removed - 1) == 1:  # without those alone the budget was met
            break
        way = search.way(removed, best["heads"])
        if best["nats"] is not None and _loss(way) >= _loss(best):
            break
        best = way
    if best["nats"] is None:
        raise ValueError(
            f"a budget must be within reach, but {narrowing.budget:g} of the "
            f"{narrowing.measure} is not, with one unit of each kind and one layer "
            "left; ask for more"
        )
    budget = search.budget(model.config.layers - best["layers"])
    return Division(best["layers"], budget, best["heads"], search.tried)


def _loss(way: dict[str, Any]) -> float:
    return math.inf if way["nats"] is None else way["nats"]


class _Search:
    """The ways that were tried, in this process and before it was stopped."""

    def __init__(
        self,
        model: LoadedModel,
        narrowing: Narrowing,
        tokens: np.ndarray,
        batch: int,
        work: Path,
        note: Callable[[str], None],
    ) -> None:
        self._model, self._narrowing, self._batch = model, narrowing, batch
        self._work, self._note = work, note
        judging = -(-len(tokens) // 4)
        # (sequences, length) each
        self._tokens, judges = np.split(tokens, [len(tokens) - judging])
        counted = np.ones((judging, tokens.shape[1] - 1), bool)
        self._judges = perplexity.Windows(judges, counted, {})
        self._smaller: dict[int, LoadedModel] = {0: model}
        self._costs: dict[int, float] = {}
        place = work / _TRIED
        self.tried = read_json(place)["tried"] if place.is_file() else []

    def way(self, removed: int, heads: float) -> dict[str, Any]:
        """The loss without so many layers, what the budget still asks for removed."""
        layers = self._model.config.layers - removed
        for earlier in self.tried:
            if (earlier["layers"], earlier["heads"]) == (layers, heads):
                return earlier
        nats = self._nats(removed, heads)
        way = {"layers": layers, "heads": heads, "nats": nats}
        result = "out of reach" if nats is None else f"{nats:.4f} nats a token"
        self._note(f"{layers} layers, heads {heads:g} of neurons: {result}")
        self.tried.append(way)
        atomic.replace_json(self._work / _TRIED, {"tried": self.tried})
        return way

    def budget(self, removed: int) -> float:
        """The share of the model without so many layers that may stay, at most 1."""
        share = self._narrowing.budget or 1
        return min(share * self._cost(0) / self._cost(removed), 1.0)

    def _cost(self, removed: int) -> float:
        """What the model without so many layers costs."""
        if removed not in self._costs:
            model = self._without(removed)
            self._costs[removed] = units.count_cost(model, self._narrowing.measure)
        return self._costs[removed]

    def _without(self, removed: int) -> LoadedModel:
        if removed not in self._smaller:
            result = units.search_layers(
                self._model,
                self._tokens,
                self._model.config.layers - removed,
                batch=self._batch,
                work=self._work,
                note=self._note,
            )
            self._smaller[removed] = units.keep_layers(self._model, result.kept)
        return self._smaller[removed]

    def _nats(self, removed: int, heads: float) -> float | None:
        """The loss a token of a way, or None where its budget is out of reach."""
        small, budget = self._without(removed), self.budget(removed)
        narrowing = self._narrowing._replace(budget=budget, heads_per_neurons=heads)
        if budget < 1:
            try:
                small, _ = units.narrow(
                    small, narrowing, self._tokens, batch=self._batch, work=self._work
                )
            except OutOfReach:
                return None
        measured = perplexity.measure_perplexity(
            small.decoder(), self._judges, batch=self._batch
        )
        nats: float | None = measured["nats"]
        return nats
