"""What pruning costs once beside what it saves, against sums made by hand."""

import copy

import pytest

from experiments.report import life_cycle, sections
from tests.support.synthetic import Page, synthetic

FLOP, BYTE = 2.3e-12, 160e-12  # joules


@pytest.fixture
def results():
    """One seed that trained 1000 steps of 100 tokens on 10 weights in 50 s."""
    made = synthetic(seeds=1, criteria=1, sparsities=(0.5, 0.8), layers=1)
    made["model"] |= {"parameters": 10, "prunable": 8}
    made["seeds"][0]["dense"]["steps"] = 1000
    made["costs"] = [
        {
            "sparsity": 0.5,
            "bytes_dense": 40,
            "bytes_packed": 25,
            "flops_dense": 20.0,
            "flops_kept": 12.0,
        },
        {
            "sparsity": 0.8,
            "bytes_dense": 40,
            "bytes_packed": 41,  # an index that takes more than it saves
            "flops_dense": 20.0,
            "flops_kept": 20.0,
        },
    ]
    phase = {"seed": 0, "peak_memory_bytes": None, "energy_kwh": None, "co2_kg": None}
    made["phases"] = [
        {"name": "train", "seconds": 50.0, "tokens_per_second": 2000.0, **phase},
        {"name": "control", "seconds": 5.0, "tokens_per_second": 2000.0, **phase},
        {"name": "prune", "seconds": 2.0, "tokens_per_second": None, **phase},
        {"name": "sample", "seconds": 9.0, "tokens_per_second": None, **phase},
    ]
    return made


def test_energy_is_counted_from_flops_and_bytes(results):
    cycle = life_cycle.from_results(results)
    arithmetic = 3 * 20 * 100_000 * FLOP
    weights = 40 * 10 * 1000 * BYTE
    averages = 2 * 8 * 8 * 1000 * BYTE  # of E[g^2], and of the weights for the page
    assert cycle.training == pytest.approx(arithmetic + weights)
    assert cycle.tracking == pytest.approx(averages)
    whole = arithmetic + weights + averages
    assert cycle.retraining == pytest.approx(whole * 5 / 50)
    assert cycle.sweep == pytest.approx(whole * 2 / 50)
    assert not cycle.measured
    assert cycle.co2 * 3.6e6 == pytest.approx(0.475)
    alone = cycle.serving[1][0.5]
    assert alone.dense == pytest.approx(40 * BYTE + 20 * FLOP)
    assert alone.packed == pytest.approx(25 * BYTE + 20 * FLOP)
    assert alone.skipped == pytest.approx(25 * BYTE + 12 * FLOP)
    assert cycle.serving[32][0.5].packed == pytest.approx(25 / 32 * BYTE + 20 * FLOP)


def test_only_averages_that_were_held_are_counted(results):
    two = life_cycle.from_results(results).tracking
    for held in (["weight"], ["square", "weight"], ["square", "taylor", "weight"]):
        results["averages"] = held
        tracking = life_cycle.from_results(results).tracking
        assert tracking == pytest.approx(two * len(held) / 2)


def test_a_control_of_no_step_is_no_cost(results):
    results["phases"][1] |= {"share": 0.0}
    assert life_cycle.from_results(results) is None


def test_a_training_that_went_on_from_a_checkpoint_costs_as_much(results):
    whole = life_cycle.from_results(results)
    results["phases"][0] |= {"seconds": 5.0, "share": 0.1}  # the last tenth of it
    cycle = life_cycle.from_results(results)
    assert cycle.training == pytest.approx(whole.training)
    assert cycle.tracking == pytest.approx(whole.tracking)
    assert cycle.sweep == pytest.approx(whole.sweep)
    assert cycle.retraining == pytest.approx(whole.retraining)


def test_measured_energy_scales_all_that_was_counted(results):
    counted = life_cycle.from_results(results)
    spent = counted.training + counted.tracking
    for phase in results["phases"]:
        phase |= {"energy_kwh": 0.0, "co2_kg": 0.0}
    results["phases"][0] |= {"energy_kwh": 7 * spent / 3.6e6, "co2_kg": 1e-9}
    results["phases"][1] |= {"energy_kwh": 3 * spent / 3.6e6, "co2_kg": 1e-9}
    cycle = life_cycle.from_results(results)
    assert cycle.measured
    assert cycle.tracking == pytest.approx(7 * counted.tracking)
    assert cycle.serving[1][0.5].dense == pytest.approx(
        7 * counted.serving[1][0.5].dense
    )
    assert cycle.retraining == pytest.approx(3 * spent)
    assert cycle.sweep == pytest.approx(7 * spent * 2 / 50)
    assert cycle.co2 == pytest.approx(1e-9 / (7 * spent))


def test_it_is_a_mean_of_the_seeds(results):
    alone = life_cycle.from_results(results)
    other = copy.deepcopy(results["seeds"][0]) | {"seed": 1}
    results["seeds"].append(other)
    results["phases"] += [phase | {"seed": 1} for phase in results["phases"]]
    both = life_cycle.from_results(results)
    assert both.once == pytest.approx(alone.once)
    assert both.training == pytest.approx(alone.training)


def test_it_is_paid_back_where_the_curves_cross_or_never():
    assert life_cycle.pays_back(12.0, 5.0, 2.0) == 4.0
    assert life_cycle.pays_back(12.0, 5.0, 5.0) is None
    assert life_cycle.pays_back(12.0, 5.0, 6.0) is None


def test_the_page_says_after_how_many_tokens(results):
    cycle = life_cycle.from_results(results)
    saved = cycle.serving[1][0.5].dense - cycle.serving[1][0.5].packed
    text = Page(sections.document(results)).text
    assert life_cycle.TITLE in text
    assert f"{cycle.once / saved:,.0f}" in text
    assert "never" in text  # 80 % is packed in more bytes than it has


@pytest.mark.parametrize("lacking", ["costs", "phases"])
def test_without_costs_the_page_has_no_such_section(results, lacking):
    results[lacking] = None
    assert life_cycle.section(results) is None
    assert life_cycle.TITLE not in Page(sections.document(results)).text


def test_a_training_that_was_only_resumed_is_not_counted(results):
    results["phases"][0]["tokens_per_second"] = None
    assert life_cycle.section(results) is None
