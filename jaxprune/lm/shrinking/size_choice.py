"""One size for each group within a total cost: by dynamic programming, then by trying.

Each group of units (the neurons of a layer, its heads) has a few sizes, each with its
cost and its damage. If damages add up, a knapsack finds the best sizes. They do not
quite, so a short search follows: some sizes are swapped, a group loses a step and
another gains one, and what is better by a measured loss stays.

References:
  Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary
  Search", 2024, arXiv 2410.14649: level switches, and a selection by few tokens before
  one by many. Kurtic, Frantar, Alistarh, "ZipLM", 2023, arXiv 2302.04089: the knapsack.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprune.arrays.rules import Rule, check
from jaxprune.structured.budget import OutOfReach

Choice = dict[str, int]
"""Group name to the place of its size in its menu."""

_MOST = 20_000  # totals that the knapsack tells apart
_SWITCHES = 3  # swaps of an offspring, at most
_DRAWN = 4  # swaps that are drawn for one that is judged


class Menu(NamedTuple):
    """The sizes that a group can have, ascending.

    Attributes:
      sizes: numbers of units.
      costs: what each costs, integers.
      damages: what each takes from the model, on a scale that all groups share; less is
        better, negative is a gain.
    """

    sizes: tuple[int, ...]
    costs: tuple[int, ...]
    damages: tuple[float, ...]


def choose_sizes(menus: Mapping[str, Menu], budget: int) -> Choice:
    """The sizes of the least sum of damages whose costs are within a budget.

    Exact where the differences of costs have a common divisor that leaves at most
    20,000 totals; otherwise costs are rounded up to such a unit, so that the budget
    holds in any case.

    Args:
      menus: group name to its sizes.
      budget: greatest sum of costs.

    Returns:
      Group name to the place of its size.

    Raises:
      OutOfReach: the smallest sizes cost more.

    Example:
      >>> menu = Menu((1, 2), (10, 20), (0.5, 0.0))
      >>> choose_sizes({"a": menu, "b": menu._replace(damages=(0.1, 0.0))}, 30)
      {'a': 1, 'b': 0}
    """
    least = {name: min(menu.costs) for name, menu in menus.items()}
    spare = budget - sum(least.values())
    check([_REACH], spare=spare, budget=budget, least=budget - spare)
    extra = {n: [cost - least[n] for cost in menu.costs] for n, menu in menus.items()}
    divisor = math.gcd(*(cost for costs in extra.values() for cost in costs)) or 1
    unit = max(divisor, -(-spare // _MOST))
    totals = spare // unit + 1
    best = np.zeros(totals)  # (totals,): least damage within each
    picks: dict[str, np.ndarray] = {}
    for name, menu in menus.items():
        steps = [-(-cost // unit) for cost in extra[name]]
        candidates = np.stack(
            [
                _shifted(best, step) + damage
                for step, damage in zip(steps, menu.damages, strict=True)
            ]
        )  # (sizes, totals)
        picks[name] = candidates.argmin(0)
        best = candidates.min(0)
    choice: Choice = {}
    total = totals - 1
    for name in reversed([*menus]):
        choice[name] = int(picks[name][total])
        total -= -(-extra[name][choice[name]] // unit)
    return {name: choice[name] for name in menus}


def choose_near(
    menus: Mapping[str, Menu], start: Choice, budget: int, radius: int
) -> Choice:
    """`choose_sizes` among sizes that are few steps from those of another choice.

    Damages that were measured beside that choice add up near it alone.

    Args:
      menus: group name to its sizes.
      start: choice, within the budget.
      budget: greatest sum of costs.
      radius: number of steps that a group may go up or down.

    Returns:
      Group name to the place of its size.
    """
    first = {name: max(0, start[name] - radius) for name in menus}
    near = {
        name: _part(menu, slice(first[name], start[name] + radius + 1))
        for name, menu in menus.items()
    }
    chosen = choose_sizes(near, budget)
    return {name: first[name] + place for name, place in chosen.items()}


def _part(menu: Menu, places: slice) -> Menu:
    return Menu(menu.sizes[places], menu.costs[places], menu.damages[places])


def _shifted(best: Float[np.ndarray, " totals"], step: int) -> np.ndarray:
    """The least damage within what is left of each total after a cost."""
    if step >= len(best):
        return np.full(len(best), np.inf)
    return np.concatenate([np.full(step, np.inf), best[: len(best) - step]])


def total_cost(menus: Mapping[str, Menu], choice: Mapping[str, int]) -> int:
    """What the sizes of a choice cost together."""
    return sum(menus[name].costs[place] for name, place in choice.items())


def total_damage(menus: Mapping[str, Menu], choice: Mapping[str, int]) -> float:
    """The sum of the damages of a choice."""
    return sum(menus[name].damages[place] for name, place in choice.items())


def swapped(
    menus: Mapping[str, Menu],
    choice: Choice,
    budget: int,
    rng: np.random.Generator,
) -> Choice:
    """A choice with a few sizes swapped, within the budget.

    In each swap one group goes down by a step; then others go up, one after the other
    by a step, until none can without leaving the budget.

    Args:
      menus: group name to its sizes.
      choice: sizes that are changed; they are not touched themselves.
      budget: greatest sum of costs.
      rng: source of the groups and of the number of swaps.

    Returns:
      The other choice; the same one where nothing can be swapped.
    """
    changed, names = dict(choice), list(menus)
    # Mostly one: of two uniform numbers the smaller, as in EvoPress.
    for _ in range(int(min(rng.integers(1, _SWITCHES + 1, 2)))):
        lower = [name for name in names if changed[name] > 0]
        if not lower:
            break
        smaller = lower[rng.integers(len(lower))]
        changed[smaller] -= 1
        spare = budget - total_cost(menus, changed)
        for i in rng.permutation(len(names)):
            name, place = names[i], changed[names[i]] + 1
            if name == smaller or place == len(menus[name].sizes):
                continue
            rise = menus[name].costs[place] - menus[name].costs[place - 1]
            if rise <= spare:
                changed[name], spare = place, spare - rise
    return changed


class Progress(NamedTuple):
    """How far a search is.

    Attributes:
      choice: best sizes so far.
      loss: their loss on all batches.
      generation: number of generations that are done.
    """

    choice: Choice
    loss: float
    generation: int


def search_sizes(
    menus: Mapping[str, Menu],
    start: Progress,
    budget: int,
    loss: Callable[[Choice, int | None], float],
    *,
    generations: int,
    offspring: int = 6,
    save: Callable[[Progress], Any] = lambda progress: None,
) -> Progress:
    """Swaps sizes as long as it makes the loss smaller.

    Args:
      menus: group name to its sizes.
      start: choice to begin with, or the state of a search of the same arguments.
      budget: greatest sum of costs.
      loss: function of a choice, and of a number of batches (None for all), to the loss
        on them.
      generations: number of generations in all.
      offspring: number of choices of a generation, which are judged by one batch: of
        four times as many swaps those of the least sum of damages. The best is judged
        by all batches, if it is better by one.
      save: function that is called with the state after each generation.

    Returns:
      The last state.
    """
    state = start
    for generation in range(start.generation, generations):
        # A generation of its own seed: a search that goes on draws the same.
        rng = np.random.default_rng(generation)
        tried = [state.choice]
        for _ in range(_DRAWN * offspring):
            candidate = swapped(menus, state.choice, budget, rng)
            if candidate not in tried:
                tried.append(candidate)
        likely = sorted(tried[1:], key=lambda choice: total_damage(menus, choice))
        # Of few tokens first: most swaps are worse, and need no more to show it.
        losses = [loss(choice, 1) for choice in (state.choice, *likely[:offspring])]
        place, least = int(np.argmin(losses)), state.loss
        choice = state.choice
        if place and (nats := loss(likely[place - 1], None)) < least:
            choice, least = likely[place - 1], nats
        state = Progress(choice, least, generation + 1)
        save(state)
    return state


_REACH = Rule(
    lambda v: v.spare >= 0,
    "a budget must be within reach, but {budget:,} parameters are not: the smallest "
    "sizes have {least:,}",
    "ask for more",
    error=OutOfReach,
)
