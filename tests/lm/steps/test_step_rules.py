"""Rules of options: tables whose sentences can be filled in and name the way out."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from jaxprune.arrays.rules import check
from jaxprune.lm.steps import option_rules, rules
from jaxprune.lm.steps.settings import (
    Calibration,
    PruneJob,
    Pruning,
    RecoverJob,
    ShrinkJob,
    TrimJob,
)
from jaxprune.masking import patterns

PLACES = {"model": Path("M"), "out": Path("O")}
DERIVED = {
    "method": "wanda",
    "units": patterns.NM(2, 4),
    "fixed": 0.5,
    "device_count": 2,
    "sparsity": 0.25,
}
JOBS = {
    "prune": (PruneJob(**PLACES), [*rules.PRUNE, *rules.THROUGH_TORCH]),
    "shrink": (ShrinkJob(**PLACES), rules.SHRINK),
    "trim": (TrimJob(**PLACES, tokens=64), rules.TRIM),
    "recover": (RecoverJob(**PLACES), rules.RECOVER),
}
CASES = [(job, rule) for job, table in JOBS.values() for rule in table]


def said_by(rule, **values):
    """The sentence of a rule, as if these values broke it."""
    with pytest.raises(ValueError, match=r".") as refused:
        check(rule._replace(holds=lambda _: False), **values)
    return str(refused.value)


@pytest.mark.parametrize(("job", "rule"), CASES, ids=lambda case: type(case).__name__)
def test_each_sentence_can_be_filled_in_and_ends_without_a_stop(job, rule):
    values = option_rules.option_values(job) | DERIVED | {"layers": (2,)}
    sentence = said_by(rule, **values, ids="rows.npy", others="--ffn")
    assert "{" not in sentence
    assert not sentence.endswith(".")


def test_an_option_is_found_by_its_name_in_whatever_group_it_is():
    job = PruneJob(**PLACES, calibration=Calibration(calibration=(Path("a.txt"),)))
    values = option_rules.option_values(job)
    assert values["calibration"] == (Path("a.txt"),)
    assert values["sparsity"] is None
    assert values["model"] == Path("M")


def test_an_option_without_what_it_is_for_must_be_at_its_default():
    rule = option_rules.idle_without(Pruning, "group", "quantize", "more")
    for quantize, group in ((None, 128), ("int4", 128), ("int4", 64)):
        check([rule], quantize=quantize, group=group)
    with pytest.raises(ValueError, match="--group needs more"):
        check([rule], quantize=None, group=64)


@pytest.mark.parametrize("job", [PruneJob, ShrinkJob, RecoverJob])
def test_no_two_groups_have_an_option_of_one_name(job):
    names = [
        field.name
        for group in dataclasses.fields(job)
        if dataclasses.is_dataclass(group.default_factory)
        for field in dataclasses.fields(group.default_factory)
    ]
    assert len(names) > 10
    assert len(set(names)) == len(names)
