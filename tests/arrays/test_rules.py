"""Rules as data: the first broken one speaks, to Python and to the command."""

import math

import pytest

from jaxprune.arrays.rules import Rule, check, command_words, refusal, reworded, within

RULES = (
    within("share", 0, 1, "share must lie in [0, 1], got {share}", "give 0.5"),
    Rule(
        lambda v: v.bits is None or v.group,
        "{bits} bits need a group of {what}",
        "pass group=",
        "give --group",
        details=lambda v: {"what": "rows"},
    ),
    Rule(lambda v: v.share != 0.25, "a quarter is refused", error=TypeError),
)
NONE = {"share": None, "bits": None, "group": None}


@pytest.mark.parametrize("share", [None, 0, 0.5, 1])
def test_values_that_keep_all_rules_pass(share):
    check(RULES, **{**NONE, "share": share})


@pytest.mark.parametrize(
    ("values", "error", "sentence", "command"),
    [
        ({"share": 1.5}, ValueError, "share must lie in [0, 1], got 1.5; give 0.5", ""),
        (
            {"share": math.nan, "bits": 4},
            ValueError,
            "share must lie in [0, 1], got nan; give 0.5",
            "",
        ),
        (
            {"bits": 4},
            ValueError,
            "4 bits need a group of rows; pass group=",
            "4 bits need a group of rows; give --group",
        ),
        ({"share": 0.25}, TypeError, "a quarter is refused", ""),
    ],
)
def test_the_first_broken_rule_speaks(values, error, sentence, command):
    with pytest.raises(error) as refused:
        check(RULES, **{**NONE, **values})
    assert str(refused.value) == sentence
    assert command_words(refused.value) == (command or sentence)


def test_a_reworded_refusal_says_the_way_out_to_both():
    refused = refusal("no place", "pass place=", "give --place", OSError)
    moved = reworded(refused, ValueError, "'a': ")
    assert str(moved) == "'a': no place; pass place="
    assert command_words(moved) == "'a': no place; give --place"
    assert command_words(KeyError("x")) == "'x'"
