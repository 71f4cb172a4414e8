"""Sizes within a total: the knapsack against all choices, and the search by trying."""

import itertools

import numpy as np
import pytest

from jaxprune.lm.shrinking.size_choice import (
    Menu,
    Progress,
    choose_near,
    choose_sizes,
    search_sizes,
    swapped,
    total_cost,
)
from jaxprune.structured.budget import OutOfReach


def random_menus(rng, unit=1):
    """Three to five groups of two to four sizes, some with damages below zero."""
    menus = {}
    for group in range(rng.integers(3, 6)):
        count = int(rng.integers(2, 5))
        sizes = np.sort(rng.choice(12, count, replace=False)) + 1
        damages = rng.normal(0, 1, count).round(3)
        costs = unit * int(rng.integers(1, 4)) * sizes
        menus[f"group {group}"] = Menu(
            tuple(sizes.tolist()), tuple(costs.tolist()), tuple(damages.tolist())
        )
    return menus


def damage(menus, choice):
    return sum(menus[name].damages[place] for name, place in choice.items())


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_as_good_as_all_choices(seed):
    menus = random_menus(np.random.default_rng(seed), unit=1 + 6 * seed)
    places = itertools.product(*(range(len(menu.sizes)) for menu in menus.values()))
    choices = [dict(zip(menus, place, strict=True)) for place in places]
    least, most = (f(total_cost(menus, c) for c in choices) for f in (min, max))
    for budget in (least, (least + most) // 2, most):
        within = [c for c in choices if total_cost(menus, c) <= budget]
        chosen = choose_sizes(menus, budget)
        assert total_cost(menus, chosen) <= budget
        best = min(damage(menus, choice) for choice in within)
        assert damage(menus, chosen) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_near_a_choice_the_knapsack_goes_few_steps(seed):
    menus = random_menus(np.random.default_rng(seed))
    start = {name: len(menu.sizes) // 2 for name, menu in menus.items()}
    budget = total_cost(menus, start)
    assert choose_near(menus, start, budget, 9) == choose_sizes(menus, budget)
    near = choose_near(menus, start, budget, 1)
    assert max(abs(near[name] - start[name]) for name in menus) <= 1
    assert total_cost(menus, near) <= budget
    assert damage(menus, near) <= damage(menus, start)


def test_costs_without_a_common_divisor_stay_within_the_budget():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.integers(10**8, 10**9, (6, 5)), axis=1)
    menus = {
        str(i): Menu(tuple(range(5)), tuple(row.tolist()), (4.0, 3.0, 2.0, 1.0, 0.0))
        for i, row in enumerate(costs)
    }
    budget = int(costs[:, 2].sum())
    chosen = choose_sizes(menus, budget)
    assert total_cost(menus, chosen) <= budget
    assert damage(menus, chosen) <= 2.0 * 6  # that of the middle sizes, which fit


def test_smallest_sizes_over_the_budget_are_out_of_reach():
    menus = {"a": Menu((1, 2), (10, 20), (1.0, 0.0))}
    with pytest.raises(OutOfReach, match="the smallest sizes have 10"):
        choose_sizes(menus, 9)


@pytest.mark.parametrize("seed", range(10))
def test_swaps_stay_within_the_budget_and_change_something(seed):
    rng = np.random.default_rng(seed)
    menus = random_menus(rng)
    middle = {name: len(menu.sizes) // 2 for name, menu in menus.items()}
    budget = total_cost(menus, middle)
    other = swapped(menus, middle, budget, rng)
    assert total_cost(menus, other) <= budget
    assert all(0 <= place < len(menus[name].sizes) for name, place in other.items())
    assert other != middle


def test_the_search_finds_what_a_loss_with_an_interaction_wants():
    # The knapsack believes that damages add up; a and b are worst where both are small.
    menus = {n: Menu((1, 2), (1, 2), (0.1, 0.0)) for n in "ab"}
    menus |= {n: Menu((1, 2), (1, 2), (0.2, 0.0)) for n in "cd"}
    budget = 6  # two may be large
    start = choose_sizes(menus, budget)
    assert start == {"a": 0, "b": 0, "c": 1, "d": 1}

    def loss(choice, batches):
        total = damage(menus, choice)
        return total + (choice["a"] == choice["b"] == 0)

    saved = []
    first = Progress(start, loss(start, None), 0)
    settings = {"generations": 6, "offspring": 4, "save": saved.append}
    end = search_sizes(menus, first, budget, loss, **settings)
    assert end.loss == pytest.approx(0.3)
    assert end.choice["a"] + end.choice["b"] == 1
    # From any state that was saved it ends in the same.
    again = search_sizes(menus, saved[1], budget, loss, **settings)
    assert again == end
