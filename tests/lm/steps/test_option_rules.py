"""Rules of options: tables whose sentences can be filled in and name the way out."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from jaxprune.lm.steps.prune_settings import PruneJob, Quantization
from jaxprune.lm.steps.shrink_settings import ShrinkJob

from jaxprune.arrays.rules import check
from jaxprune.lm.steps import option_rules, prune_rules, shrink_rules
from jaxprune.lm.steps.settings import Calibration
from jaxprune.masking import patterns

PLACES = {"model": Path("M"), "out": Path("O")}
DERIVED = {
    "method": "wanda",
    "units": patterns.NM(2, 4),
    "fixed": 0.5,
    "device_count": 2,
    "sparsity": 0.25,
}
PRUNE = [*prune_rules.WORDS, *prune_rules.RULES]


def said_by(rule, **values):
    """The sentence of a rule, as if these values broke it."""
    with pytest.raises(ValueError, match=r".") as refused:
        check(rule._replace(holds=lambda _: False), **values)
    return str(refused.value)


@pytest.mark.parametrize("rule", PRUNE, ids=lambda rule: rule.sentence)
def test_each_sentence_of_a_pruning_can_be_filled_in_and_ends_without_a_stop(rule):
    values = option_rules.option_values(PruneJob(**PLACES)) | DERIVED
    sentence = said_by(rule, **values)
    assert "{" not in sentence
    assert not sentence.endswith(".")


@pytest.mark.parametrize("rule", shrink_rules.RULES, ids=lambda rule: rule.sentence)
def test_each_sentence_of_a_shrinking_can_be_filled_in_and_ends_without_a_stop(rule):
    values = option_rules.option_values(ShrinkJob(**PLACES))
    sentence = said_by(rule, **values, ids="rows.npy")
    assert "{" not in sentence
    assert not sentence.endswith(".")


def test_an_option_is_found_by_its_name_in_whatever_group_it_is():
    job = PruneJob(**PLACES, calibration=Calibration(calibration=(Path("a.txt"),)))
    values = option_rules.option_values(job)
    assert values["calibration"] == (Path("a.txt"),)
    assert values["sparsity"] is None
    assert values["model"] == Path("M")


def test_an_option_without_what_it_is_for_must_be_at_its_default():
    rule = option_rules.idle_without(Quantization, "group", "quantize", "more")
    for quantize, group in ((None, 128), ("int4", 128), ("int4", 64)):
        check([rule], quantize=quantize, group=group)
    with pytest.raises(ValueError, match="--group needs more"):
        check([rule], quantize=None, group=64)


@pytest.mark.parametrize("job", [PruneJob, ShrinkJob])
def test_no_two_groups_have_an_option_of_one_name(job):
    names = [
        field.name
        for group in dataclasses.fields(job)
        if dataclasses.is_dataclass(group.default_factory)
        for field in dataclasses.fields(group.default_factory)
    ]
    assert len(names) > 20
    assert len(set(names)) == len(names)
